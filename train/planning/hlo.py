"""Parser of the text of an optimized XLA module: computations, instructions, arrays and device groups.

jaxlib's own objects (`hlo_modules`) have neither shapes nor attributes, and are not public, so the text is parsed.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

# Memory spaces of a layout, as in S(5); an array without one is in the device's main memory.
DEVICE = 0
HOST = 5
COLLECTIVE_KINDS = {kind: kind for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")} | {
    "ragged-all-to-all": "all-to-all", "collective-permute": "permute", "collective-broadcast": "permute"
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array of a program: its dtype, its shape on one device, and its memory space."""

    dtype: str
    dims: tuple[int, ...]
    space: int = DEVICE

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The size in bytes without padding; 0 for a token."""
        if self.dtype == "pred":
            return self.elements
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.elements * int(bits[0]) / 8) if bits else 0


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    computation: "Computation" = field(repr=False, compare=False)
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    inner: str  # text between the parentheses
    rest: str  # text after them: attributes, metadata, backend configuration
    is_root: bool

    @property
    def inputs(self) -> tuple[Array, ...]:
        """The arrays of all operands."""
        return arrays_of(self.computation, self.operands)

    @property
    def users(self) -> list["Instruction"]:
        """The instructions that have this one as an operand."""
        return [instruction for instruction in self.computation.values() if self.name in instruction.operands]

    def find(self, pattern: str) -> str:
        """Returns the first group of a pattern in the attributes, or an empty string without a match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Returns the computations named by attributes such as calls=%name or branch_computations={%a, %b}."""
        groups = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%[^\s,]+)", self.rest)
        return [name for group in groups for name in re.findall(r"%([^\s,{}]+)", group)]

    def number(self, key: str) -> int | None:
        """Returns the integer of an attribute written as key=1, "key":"1" or "key":{"n":"1"}, if there is one."""
        digits = self.find(rf'\b{key}"?[=:]\s*(?:\{{"n":)?"?(-?\d+)')
        return int(digits) if digits else None

    @property
    def source(self) -> str:
        """The operation of the traced program that this instruction implements."""
        return self.find(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """The function that a custom call calls."""
        return self.find(r'custom_call_target="([^"]*)"')

    @property
    def kind(self) -> str | None:
        """The kind of collective, or None for any other instruction."""
        is_permute = self.opcode == "send" and "source_target_pairs" in self.rest
        return "permute" if is_permute else COLLECTIVE_KINDS.get(self.opcode.removesuffix("-start"))

    @property
    def is_product(self) -> bool:
        """True if the instruction calls a library for a matrix product."""
        return self.opcode == "custom-call" and any(word in self.target for word in ("gemm", "matmul"))


# Instructions by name, in the order in which they run.
Computation = dict[str, Instruction]


def arrays_of(computation: Computation, names: Iterable[str]) -> tuple[Array, ...]:
    """Returns the results of the named instructions that are part of a computation."""
    return tuple(array for name in names if name in computation for array in computation[name].results)


def numbers(text: str) -> list[int]:
    """Returns all whole numbers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _closing(text: str, start: int) -> int:
    """Returns the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _add_instruction(computation: Computation, text: str) -> None:
    head = re.match(r"\s+(ROOT )?%([^\s=]+) = ", text)
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
    opcode = text[end:opening].strip()
    rest = text[closing:]
    computation[head[2]] = Instruction(computation, head[2], opcode, results, operands, inner, rest, bool(head[1]))


def computations_of(text: str) -> tuple[dict[str, Computation], str]:
    """Returns all computations by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    entry = ""
    computation = r"^(ENTRY )?%([^\s(]+) \(.*\{\n((?:.*\n)*?)\}(?:, execution_thread=.*)?$"
    for is_entry, name, body in re.findall(computation, text, re.M):
        computations[name] = {}
        entry = name if is_entry else entry
        # A kernel's metadata may contain line breaks.
        for instruction in re.split(r"^(?=[ \t]+(?:ROOT )?%[^\s=]+ = )", body, flags=re.M)[1:]:
            _add_instruction(computations[name], instruction.removesuffix("\n"))
    return computations, entry


def _iota(text: str) -> np.ndarray:
    """Returns the numbers of an iota such as [4,2]T(1,0), reshaped and transposed, or of a plain list."""
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not iota:
        return np.array(numbers(text))
    x = np.arange(math.prod(numbers(iota[1]))).reshape(numbers(iota[1]))
    return (x.transpose(numbers(iota[2])) if iota[2] else x).ravel()


def device_groups(text: str, devices: int) -> np.ndarray:
    """Returns groups of partitions [groups, members] from any XLA notation; an empty array if each is alone."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = np.array(numbers(match[1]), int).reshape(-1, 2)
        return pairs[pairs[:, 0] != pairs[:, 1]]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^{]*)\))? ?\{([^}]*)\}", text):
        # The text names a mesh and the axes along which a group extends; 'axis':(before)size is a part of an axis.
        dims: list[int] = []
        group_axes: list[int] = []
        parts_of_axis = {name: parts for name, *parts in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])}
        for name, size in re.findall(r"'([^']+)'=(\d+)", match[1]):
            before, part = (int(digits or 0) for digits in parts_of_axis.get(name, ("", "")))
            group_axes += [len(dims) + bool(part)] if name in parts_of_axis else []
            dims += [before, part, int(size) // before // part] if part else [int(size)]
        order = _iota(match[2] or f"[{math.prod(dims)}]").reshape(dims)
        members = math.prod(dims[axis] for axis in group_axes)
        return np.moveaxis(order, group_axes, range(-len(group_axes), 0)).reshape(-1, members)
    if match := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(match[2]).reshape(numbers(match[1]))
    match = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = [numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])] if match else []
    return np.array([group for group in groups if len(group) == len(groups[0])] or [list(range(devices))])
