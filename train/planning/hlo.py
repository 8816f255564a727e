"""The text of an optimized XLA module, taken apart: computations, instructions, arrays, groups of devices."""

import math
import re
from dataclasses import dataclass

import numpy as np

# Memory spaces of a layout, as in S(5). What stands in none is in the device's main memory.
DEVICE, HOST = 0, 5
KINDS = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "permute",
    "collective-broadcast": "permute",
}


@dataclass(frozen=True)
class Array:
    """An array of a program: its dtype, its shape on one device, and its memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = DEVICE

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its size without padding; a token has none."""
        if self.dtype == "pred":
            return self.elements
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.elements * int(bits[0]) / 8) if bits else 0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    inner: str  # between the parentheses
    rest: str  # behind them: attributes, metadata, the backend's configuration
    is_root: bool

    def find(self, pattern: str) -> str:
        """The first group of a pattern behind the operands; empty: it is not there."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def called(self, *keys: str) -> list[str]:
        """Names of the computations behind attributes such as calls=%name or branch_computations={%a, %b}."""
        found = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[^\s,]+)", self.rest)
        return [name for group in found for name in re.findall(r"%([^\s,{}]+)", group)]

    def number(self, key: str) -> int | None:
        """Behind key=1, "key":"1" or "key":{"n":"1"}."""
        found = self.find(rf'\b{key}"?[=:]\s*(?:\{{"n":)?"?(-?\d+)')
        return int(found) if found else None

    @property
    def source(self) -> str:
        """The operation of the traced program that it is from."""
        return self.find(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """What a custom call calls."""
        return self.find(r'custom_call_target="([^"]*)"')

    @property
    def kind(self) -> str | None:
        """Of a collective."""
        is_permute = self.opcode == "send" and "source_target_pairs" in self.rest
        return "permute" if is_permute else KINDS.get(self.opcode.removesuffix("-start"))

    @property
    def is_product(self) -> bool:
        """Whether it calls a library for a matrix product."""
        return self.opcode == "custom-call" and any(word in self.target for word in ("gemm", "matmul"))


Computation = dict[str, Instruction]
_HEAD = re.compile(r"\s+(?:ROOT )?%([^\s=]+) = ")


def numbers(text: str) -> list[int]:
    """All whole numbers of a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _instruction(text: str) -> Instruction:
    head = _HEAD.match(text)
    assert head, text
    start = head.end()
    end = _closing(text, start) if text[start] == "(" else text.index(" ", start)
    opening = text.index("(", end)
    closing = _closing(text, opening)
    results = tuple(
        Array(dtype, tuple(numbers(dims)), int(space or DEVICE))
        for dtype, dims, space in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?", text[start:end])
    )
    inner = text[opening + 1 : closing - 1]
    operands = tuple(re.findall(r"%([^\s,(){}]+)", inner))
    return Instruction(head[1], text[end:opening].strip(), results, operands, inner, text[closing:], "ROOT" in head[0])


def computations_of(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry."""
    found: dict[str, Computation] = {}
    entry, current = "", ""
    lines: list[str] = []
    for line in text.splitlines():
        if not current:
            if head := re.match(r"(ENTRY )?%([^\s(]+) \(.*\{$", line):
                current = head[2]
                found[current] = {}
                entry = current if head[1] else entry
            continue
        # The metadata of a kernel may hold line breaks.
        ends = re.fullmatch(r"\}(, execution_thread=.*)?", line)
        if lines and (ends or _HEAD.match(line)):
            instruction = _instruction("\n".join(lines))
            found[current][instruction.name] = instruction
            lines = []
        if ends:
            current = ""
        elif lines or _HEAD.match(line):
            lines.append(line)
    return found, entry


def _iota(text: str) -> np.ndarray:
    """The numbers of [4,2]T(1,0): 0, 1, ... laid out so and transposed; or those of a list."""
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        return np.array(numbers(text))
    x = np.arange(math.prod(numbers(found[1]))).reshape(numbers(found[1]))
    return (x.transpose(numbers(found[2])) if found[2] else x).ravel()


def device_groups(text: str, devices: int) -> np.ndarray:
    """Groups of partitions [groups, members] in any of XLA's notations; empty: each is alone."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = np.array(numbers(found[1]), int).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}", text):
        # A mesh of its own, and of it the axes along which a group extends; 'axis':(before)size is a part of one.
        dims: list[int] = []
        mine: list[int] = []
        asked = {name: parts for name, *parts in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[3])}
        for name, size in re.findall(r"'([^']+)'=(\d+)", found[1]):
            before, own = (int(part or 0) for part in asked.get(name, ("", "")))
            mine += [len(dims) + bool(own)] if name in asked else []
            dims += [before, own, int(size) // before // own] if own else [int(size)]
        order = _iota(found[2] or f"[{math.prod(dims)}]").reshape(dims)
        members = math.prod(dims[axis] for axis in mine)
        return np.moveaxis(order, mine, range(-len(mine), 0)).reshape(-1, members)
    if found := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(found[2]).reshape(numbers(found[1]))
    found = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = [numbers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])] if found else []
    return np.array([group for group in groups if len(group) == len(groups[0])] or [list(range(devices))])
