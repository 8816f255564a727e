"""What one device does in a training step, read from the text of its compiled program.

XLA's optimized module is scheduled: the instructions of a computation stand in the order in which they run, loops and
branches name the computations that they run, and what is asynchronous has a start and a done. `read_program` turns
modules for TPU, GPU and CPU alike into a tree of operations. Sums over it weigh the body of a loop by its trips, which
XLA's own `cost_analysis` does not. `timeline` runs the schedule at given speeds.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

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
COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
NOTHING = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "add-dependency", "recv", "send-done", "async-update", "call-update", "domain",
}  # fmt: skip
BOOKKEEPING = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceId", "ZeroCrop", "Sharding"}
# Of more the compiler has no idea: ten minutes.
MOST_CYCLES = 10**12
# Products over all pairs of positions that an attention kernel makes, by a part of its name.
ATTENTION = {"mha_fwd": 2, "mha_dq": 3, "mha_dkv": 4, "SoftmaxBackward": 5, "fmha": 2}


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
class Collective:
    """One communication between devices, and how often a step does it.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all or permute.
        axes: mesh axes along which the devices of a group differ, in the mesh's order; one named "slice" is slow.
        group: devices that take part.
        dtype: of the largest array.
        payload_bytes: of all arrays: the output of a gather, the input of the others.
        asynchronous: whether something may run meanwhile.
        source: the operation of the traced program.
        count: times a step.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    dtype: str
    payload_bytes: int
    asynchronous: bool
    source: str
    count: int = 1

    @property
    def slow(self) -> bool:
        """Whether it crosses slices."""
        return "slice" in self.axes

    @property
    def sent_bytes(self) -> float:
        """What one device sends, once, where the group is a ring."""
        share = 1 if self.kind == "permute" else (self.group - 1) / self.group
        return self.payload_bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Kernel:
    """A custom call that is no plain matrix product, such as attention.

    Attributes:
        name: of a Pallas kernel, or the call's target.
        operands: in order; so are results.
        estimate: FLOPs that the kernel itself states (Pallas's `cost_estimate`).
        source: the operation of the traced program.
    """

    name: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    estimate: float | None
    source: str

    @property
    def attention_flops(self) -> float:
        """FLOPs of an attention kernel's products over all pairs of positions, masked ones too; 0: it is another.

        Splash attention takes [..., H, T, C], cuDNN [B, T, H, C]; queries first, then keys.
        """
        products = next((number for part, number in ATTENTION.items() if part in self.name), 0)
        arrays = [array for array in self.operands if len(array.dims) > 2 and re.match(r"b?f\d", array.dtype)]
        if not products or len(arrays) < 2:
            return 0.0
        return 2.0 * products * arrays[0].elements * arrays[1].dims[-3 if "fmha" in self.name else -2]


@dataclass(frozen=True)
class Operation:
    """One instruction of the schedule that takes time; a loop, branch or call holds what it runs.

    Attributes:
        name: in the module.
        flops: of matrix products, 2·M·N·K each; kernels' are not in it.
        bytes: read from and written to the device's memory.
        cycles: the TPU compiler's own estimate, its memory traffic included and its collectives not; 0: it has none.
        collective: what it sends to other devices, beside its own work.
        kernel: the custom call that it is.
        host_bytes: moved between the device's memory and the host's.
        asynchronous: it runs on until another operation waits for it.
        waits_for: the asynchronous operation that is over when this one is.
        body: what it runs, `trips` times.
    """

    name: str
    flops: float = 0.0
    bytes: int = 0
    cycles: int = 0
    collective: Collective | None = None
    kernel: Kernel | None = None
    host_bytes: int = 0
    asynchronous: bool = False
    waits_for: str | None = None
    body: tuple["Operation", ...] = ()
    trips: int = 1


@dataclass(frozen=True)
class Program:
    """What one device does in one run of a module.

    Attributes:
        operations: of the entry computation, in order.
        arrays: every result that lies in memory: of all instructions but those inside fusions.
        instructions: of the whole module, which says how large it is.
        aliases: results that take the memory of an argument.
        notes: what could not be read, in words.
    """

    operations: tuple[Operation, ...]
    arrays: frozenset[Array]
    instructions: int
    aliases: int
    notes: tuple[str, ...]

    def walk(self) -> Iterator[tuple[Operation, int]]:
        """Each operation that holds no others, and how often a step runs it."""
        yield from _walk(self.operations, 1)

    @cached_property
    def matmul_flops(self) -> float:
        """FLOPs of all matrix products of a step, without those inside kernels."""
        return sum(operation.flops * times for operation, times in self.walk())

    @cached_property
    def cycles(self) -> int:
        """The TPU compiler's estimate of all that it has one for."""
        return sum(operation.cycles * times for operation, times in self.walk())

    @cached_property
    def host_bytes(self) -> int:
        """Bytes moved between the device's memory and its host's, both ways."""
        return sum(operation.host_bytes * times for operation, times in self.walk())

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Each that the module holds, once, with its count a step."""
        return tuple(replace(o.collective, count=times) for o, times in self.walk() if o.collective)

    @cached_property
    def kernels(self) -> dict[Kernel, int]:
        """Kernel → times a step."""
        found: Counter[Kernel] = Counter()
        for operation, times in self.walk():
            if operation.kernel:
                found[operation.kernel] += times
        return dict(found)

    def holding(self, elements: int) -> list[Array]:
        """The arrays of at least so many elements, the largest first."""
        return sorted((a for a in self.arrays if a.elements >= elements), key=lambda a: (-a.elements, a.dtype, a.dims))


def _walk(operations: tuple[Operation, ...], times: int) -> Iterator[tuple[Operation, int]]:
    for operation in operations:
        if operation.body:
            yield from _walk(operation.body, times * operation.trips)
        else:
            yield operation, times


def read_program(text: str, mesh_shape: Mapping[str, int]) -> Program:
    """Read a compiled module's `as_text()`.

    Args:
        text: optimized and scheduled.
        mesh_shape: axis → size, as in `mesh.shape`; partition i of the module is device i of the flattened mesh, or
            of one slice of it.
    """
    return _Reader(text, dict(mesh_shape)).program()


# --- The text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    inner: str  # between the parentheses
    rest: str  # behind them: attributes, metadata, the backend's configuration
    is_root: bool

    def find(self, pattern: str) -> str:
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
        return self.find(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
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


_Computation = dict[str, _Instruction]
_HEAD = re.compile(r"\s+(?:ROOT )?%([^\s=]+) = ")


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _instruction(text: str) -> _Instruction:
    head = _HEAD.match(text)
    assert head, text
    start = head.end()
    end = _closing(text, start) if text[start] == "(" else text.index(" ", start)
    opening = text.index("(", end)
    closing = _closing(text, opening)
    results = tuple(
        Array(dtype, tuple(_ints(dims)), int(space or DEVICE))
        for dtype, dims, space in re.findall(r"(\w+)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?", text[start:end])
    )
    inner = text[opening + 1 : closing - 1]
    operands = tuple(re.findall(r"%([^\s,(){}]+)", inner))
    return _Instruction(head[1], text[end:opening].strip(), results, operands, inner, text[closing:], "ROOT" in head[0])


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the entry."""
    found: dict[str, _Computation] = {}
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
        return np.array(_ints(text))
    x = np.arange(math.prod(_ints(found[1]))).reshape(_ints(found[1]))
    return (x.transpose(_ints(found[2])) if found[2] else x).ravel()


def _groups(text: str, devices: int) -> np.ndarray:
    """Groups of partitions [groups, members] in any of XLA's notations; empty: each is alone."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = np.array(_ints(found[1]), int).reshape(-1, 2)
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
        return _iota(found[2]).reshape(_ints(found[1]))
    found = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", found[1])] if found else []
    return np.array([group for group in groups if len(group) == len(groups[0])] or [list(range(devices))])


# --- What it says ---------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, text: str, mesh_shape: dict[str, int]):
        self.mesh_shape = mesh_shape
        self.computations, self.entry = _computations(text)
        self.head = text.partition("\n")[0]
        partitions = re.search(r"num_partitions=(\d+)", self.head)
        self.devices = int(partitions[1]) if partitions else math.prod(mesh_shape.values())
        self.notes: list[str] = []
        self.arrays: set[Array] = set()
        self.read: dict[str, tuple[Operation, ...]] = {}

    def program(self) -> Program:
        operations, instructions = self.operations(self.entry), sum(map(len, self.computations.values()))
        aliases = len(re.findall(r"(?:may|must)-alias", self.head))
        return Program(operations, frozenset(self.arrays), instructions, aliases, tuple(dict.fromkeys(self.notes)))

    def operations(self, name: str) -> tuple[Operation, ...]:
        if name not in self.read:
            computation = self.computations[name]
            # Which operation is behind the channel of a gather that has begun, and behind what a recv shares with its
            # send.
            begun: dict[int | None, str] = {}
            sends = {_rendezvous(i): i.name for i in computation.values() if i.opcode == "send"}
            found = []
            for at in computation.values():
                self.arrays.update(at.results)
                if at.opcode not in NOTHING and at.target not in BOOKKEEPING:
                    found.append(self.operation(at, computation, begun, sends))
            self.read[name] = tuple(found)
        return self.read[name]

    def operation(
        self, at: _Instruction, computation: _Computation, begun: dict[int | None, str], sends: dict[str, str]
    ) -> Operation:
        opcode, starts = at.opcode.removesuffix("-start"), at.opcode.endswith("-start")
        if opcode == "while":
            return Operation(at.name, body=self.operations(at.called("body")[0]), trips=self.trips(at, computation))
        if opcode == "conditional":
            branches = at.called("branch_computations", "true_computation", "false_computation")
            return Operation(at.name, body=max(map(self.operations, branches), key=_weight))
        if opcode == "call":
            body = self.operations(at.called("to_apply", "calls")[0])
            apart = next((o.collective for o, _ in _walk(body, 1) if o.collective), None) if starts else None
            if apart:
                return Operation(at.name, collective=replace(apart, asynchronous=True), asynchronous=True)
            return Operation(at.name, body=body)
        if opcode.endswith("-done"):
            before = at.operands[0]
            if opcode == "recv-done":
                before = sends.get(_rendezvous(computation[before]), before)
            return Operation(at.name, waits_for=before)
        if opcode == "send" and not at.kind:
            return self.sent(at, computation)
        if opcode in COPIES:
            return self.copied(at, computation, starts)

        inside = list(self.inside(at))
        operation = Operation(
            at.name,
            flops=sum(self.flops(i, c) for i, c in [(at, computation), *inside]),
            bytes=self.bytes(at, computation),
            cycles=self.cycles(at),
            kernel=self.kernel(at, computation),
        )
        holder, around = next(((i, c) for i, c in [(at, computation), *inside] if i.kind), (None, computation))
        if holder is None:
            return operation
        # The TPU compiler spreads a gather over fusions: it begins in one, goes on in others and ends in another.
        channel, targets = holder.number("channel_id"), {i.target for i, _ in inside}
        if "AsyncCollectiveDone" in targets:
            return Operation(at.name, waits_for=begun.pop(channel, at.name))
        if channel in begun:
            return operation
        if "AsyncCollectiveStart" in targets:
            begun[channel], starts = at.name, True
        elif starts or opcode == "send":
            starts = not at.find(r'"is_sync":\s*(true)')
        collective = self.collective(holder, around, starts, at)
        # Its own traffic to and from memory is part of the communication.
        bytes_ = operation.bytes if operation.flops else 0
        return replace(operation, bytes=bytes_, collective=collective, asynchronous=starts and collective is not None)

    def inside(self, at: _Instruction) -> Iterator[tuple[_Instruction, _Computation]]:
        """All that a fusion, or what wraps one instruction, is made of, and in which computation it stands."""
        for name in at.called("calls"):
            for instruction in self.computations[name].values():
                yield instruction, self.computations[name]
                yield from self.inside(instruction)

    def collective(
        self, at: _Instruction, computation: _Computation, asynchronous: bool, outer: _Instruction
    ) -> Collective | None:
        """None: nothing leaves the device."""
        groups, kind, operands = _groups(at.rest, self.devices), at.kind, _results(at.operands, computation)
        if "source_target_pairs={}" in at.rest:
            self.notes.append(f"{at.name}: nobody sends anything, so that its result is all zeros ({at.source})")
        if groups.size == 0 or groups.shape[1] == 1 or not operands:
            return None
        assert kind
        if kind == "all-reduce" and at is not outer:
            # A TPU's scattered sum of a group is a fusion which only a slice of the sum leaves.
            sums = {at.name, *(i.name for i in computation.values() if at.name in i.operands)}
            slices = [i for i in computation.values() if i.opcode == "dynamic-slice" and i.operands[0] in sums]
            kind = "reduce-scatter" if slices else kind
        places = np.unravel_index(groups, tuple(self.mesh_shape.values()))
        axes = tuple(axis for axis, x in zip(self.mesh_shape, places, strict=True) if (x != x[:, :1]).any())
        size = groups.shape[1]
        payload = sum(array.bytes for array in operands) * (size if kind == "all-gather" else 1)
        dtype = max(operands, key=lambda array: array.bytes).dtype
        return Collective(kind, axes, size, dtype, payload, asynchronous, at.source or outer.source)

    def sent(self, at: _Instruction, computation: _Computation) -> Operation:
        """A send to the host, or to the runtime that carries out collectives between slices."""
        array = _results(at.operands, computation)[0]
        transfer = at.find(r'_xla_megascale_transfer_type="(\w+)"')
        if not transfer:
            return Operation(at.name, host_bytes=array.bytes, asynchronous=True)
        slices = math.prod(self.mesh_shape.values()) // self.devices
        kind = transfer.lower().replace("_", "-")
        kind = kind if kind in KINDS else "all-to-all"
        payload = array.bytes * (slices if kind == "all-gather" else 1)
        collective = Collective(kind, ("slice",), slices, array.dtype, payload, True, at.source)
        return Operation(at.name, collective=collective, asynchronous=True)

    def copied(self, at: _Instruction, computation: _Computation, asynchronous: bool) -> Operation:
        """A copy of an array or of a part, within the device's memory or between it and the host's."""
        operands, kind = _results(at.operands, computation), at.opcode.removesuffix("-start")
        if kind == "dynamic-update-slice":
            before, into, moved = operands[1], operands[0], operands[1].bytes
        else:
            # What a slice's start gives holds its operands first.
            before, into = operands[0], at.results[len(operands) if asynchronous and kind != "copy" else 0]
            moved = into.bytes
        spaces = {before.space, into.space}
        if HOST in spaces and spaces != {HOST}:
            return Operation(at.name, host_bytes=moved, asynchronous=asynchronous)
        sides = 2 if spaces == {DEVICE} else int(DEVICE in spaces)
        return Operation(at.name, bytes=moved * sides, cycles=self.cycles(at), asynchronous=asynchronous)

    def kernel(self, at: _Instruction, computation: _Computation) -> Kernel | None:
        if at.opcode != "custom-call" or at.is_product:
            return None
        estimate = at.find(r'cost_estimate"?:\s*\{[^}]*?"flops":\s*"?(\d+)')
        name = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", at.name) if at.target == "tpu_custom_call" else at.target
        operands = _results(at.operands, computation)
        return Kernel(name, operands, at.results, float(estimate) if estimate else None, at.source)

    def cycles(self, at: _Instruction) -> int:
        cycles = at.number("estimated_cycles") or 0
        if cycles > MOST_CYCLES:
            self.notes.append(f"{at.name}: the compiler's estimate of {cycles} cycles is left out")
        return cycles if cycles <= MOST_CYCLES else 0

    def flops(self, at: _Instruction, computation: _Computation) -> float:
        """2·M·N·K of a matrix product, however it is written."""
        if at.opcode == "convolution":
            return _convolution_flops(at, *_results(at.operands[:2], computation))
        if at.opcode != "dot" and not at.is_product:
            return 0.0
        dims = _results(at.operands[:1], computation)[0].dims
        contracted = _ints(at.find(r'lhs_contracting_dim\w*"?[=:]\s*[\[{]([^\]}]*)'))
        if at.is_product and not contracted:
            contracted = [len(dims) - 1]
        return 2.0 * at.results[0].elements * math.prod(dims[axis] for axis in contracted)

    def bytes(self, at: _Instruction, computation: _Computation) -> int:
        """Device memory that it reads and writes: of what it slices or updates in place, only that part."""
        operands = [computation[name].results for name in at.operands if name in computation]
        if at.opcode in ("gather", "reshape"):
            return 2 * _in_memory(at.results)
        if at.opcode == "scatter":
            return 2 * sum(map(_in_memory, operands[1:]))
        if not (at.opcode.startswith("fusion") and at.called("calls")):
            return sum(map(_in_memory, [*operands, at.results]))
        body = self.computations[at.called("calls")[0]]
        users: defaultdict[str, list[_Instruction]] = defaultdict(list)
        for instruction in body.values():
            for name in instruction.operands:
                users[name].append(instruction)
        parameters = [i for i in body.values() if i.opcode == "parameter"]
        total = sum(min(_in_memory(operands[int(i.inner)]), _part(i, users)) for i in parameters)
        root = next(i for i in body.values() if i.is_root)
        roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, result in zip(at.results, roots, strict=False):
            while result.opcode in ("bitcast", "convert", "copy"):
                result = body[result.operands[0]]
            updates = {"dynamic-update-slice": slice(1, 2), "scatter": slice(2, 3)}.get(result.opcode)
            part = (array,) if updates is None else _results(result.operands[updates], body)
            total += min(_in_memory((array,)), sum(x.bytes for x in part))
        return int(total)

    def trips(self, at: _Instruction, computation: _Computation) -> int:
        """As XLA says; else from its counter's bound, start and step, where these are constants as those of a scan."""
        known = at.number("known_trip_count")
        if known is not None:
            return known
        condition, body = (self.computations[at.called(key)[0]] for key in ("condition", "body"))
        compare, after = (next(i for i in c.values() if i.is_root) for c in (condition, body))
        numbers = [_constant(condition, name) for name in compare.operands]
        limit = next((number for number in numbers if number is not None), None)
        counters = [
            condition[name].number("index") for name in compare.operands if condition[name].opcode != "constant"
        ]
        if limit is None or len(counters) != 1 or counters[0] is None or "direction=GE" in compare.rest:
            self.notes.append(f"{at.name}: how often it runs is not in the program; it is taken to run once")
            return 1
        before = computation[at.operands[0]]
        first = _constant(computation, before.operands[counters[0]]) if before.opcode == "tuple" else 0
        change = body[after.operands[counters[0]]] if after.opcode == "tuple" else after
        steps = [_constant(body, name) for name in change.operands] if change.opcode == "add" else []
        step = next((number for number in steps if number), 1)
        return max(-(-abs(limit - (first or 0)) // abs(step)) + ("direction=LE" in compare.rest), 0)


def _weight(operations: tuple[Operation, ...]) -> tuple[float, ...]:
    steps = list(_walk(operations, 1))
    return tuple(sum(getattr(o, name) * times for o, times in steps) for name in ("cycles", "flops", "bytes"))


def _rendezvous(at: _Instruction) -> str:
    """What a send and the recv that belongs to it have in common."""
    return at.find(r'rendezvous="([^"]*)"') or str(at.number("channel_id"))


def _results(names: tuple[str, ...], computation: _Computation) -> tuple[Array, ...]:
    return tuple(array for name in names if name in computation for array in computation[name].results)


def _in_memory(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == DEVICE)


def _part(at: _Instruction, users: Mapping[str, list[_Instruction]]) -> float:
    """Bytes that a fusion reads of one of its arrays, where it reads but slices of it; else no bound."""
    total = 0.0
    for user in users[at.name]:
        in_place = user.operands[0] == at.name
        if user.opcode == "bitcast":
            total += _part(user, users)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and in_place:
            total += sum(array.bytes for array in user.results)
        elif not (user.opcode in ("dynamic-update-slice", "scatter") and in_place):
            return math.inf
    return total


def _constant(computation: _Computation, name: str) -> int | None:
    """The value of an integer, seen through copies."""
    at = computation.get(name)
    while at and at.opcode in ("copy", "bitcast", "convert"):
        at = computation.get(at.operands[0])
    return int(at.inner) if at and at.opcode == "constant" and re.fullmatch(r"-?\d+", at.inner) else None


def _convolution_flops(at: _Instruction, left: Array, right: Array) -> float:
    """The batch, contracted and free dimensions of a product may each be a window; what a window pads is no work."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.rest)
    assert labels
    of_left, of_right, of_result = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", at.find(r"window=\{([^}]*)\}")))
    total = 2.0 * right.dims[of_right.index("i")] * right.dims[of_right.index("o")] * left.dims[of_left.index("b")]
    total /= at.number("batch_group_count") or 1
    for i in range(len(of_left) - 2):
        stride, spread, dilation, low = (
            int(window[name].split("x")[i].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        base, kernel = left.dims[of_left.index(str(i))], right.dims[of_right.index(str(i))]
        out = np.arange(at.results[0].dims[of_result.index(str(i))]) * stride - low
        places = (out + k * dilation for k in range(kernel))
        total *= sum(int(((x >= 0) & (x <= (base - 1) * spread) & (x % spread == 0)).sum()) for x in places)
    return total


# --- Time -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """The speeds of one device.

    Attributes:
        cycles_per_second: of the compiler's cycles; 0: there are none, a roofline is taken.
        peak_flops: FLOP/s.
        memory_bandwidth: bytes/s of the device's memory.
        bandwidth: mesh axes → bytes/s that a device sends to those with which it shares them.
        host_bandwidth: bytes/s to and from the host's memory.
        kernel_seconds: of kernels; none: a roofline of their own estimate, or of attention over all pairs.
    """

    cycles_per_second: float
    peak_flops: float
    memory_bandwidth: float
    bandwidth: Callable[[tuple[str, ...]], float]
    host_bandwidth: float
    kernel_seconds: Callable[[Kernel], float] | None = None

    def seconds(self, operation: Operation) -> float:
        """Of an operation's own work, without what it communicates."""
        if operation.cycles and self.cycles_per_second:
            return operation.cycles / self.cycles_per_second
        kernel, flops = operation.kernel, operation.flops
        if kernel:
            if self.kernel_seconds:
                return self.kernel_seconds(kernel)
            flops = kernel.attention_flops if kernel.estimate is None else kernel.estimate
        return max(flops / self.peak_flops, operation.bytes / self.memory_bandwidth)


@dataclass(frozen=True)
class Timeline:
    """Where the seconds of a step go: `total` is `compute`, all of `waiting`, `memory` and `host`.

    Attributes:
        total: of the step.
        compute: of fusions, products and kernels.
        waiting: mesh axes → for communication that nothing hides.
        memory: for copies within the device's memory that nothing hides.
        host: for copies to and from the host that nothing hides.
        communication: mesh axes → of all communication, hidden or not.
        transfer: of all copies to and from the host, hidden or not.
    """

    total: float
    compute: float
    memory: float
    host: float
    transfer: float
    waiting: dict[tuple[str, ...], float]
    communication: dict[tuple[str, ...], float]


def timeline(program: Program, costs: Costs) -> Timeline:
    """Run the schedule as the compiler wrote it: one thing after another, but for what is asynchronous.

    That begins at its start, once the link that it needs is free (one within slices, one between them, one to the
    host, one within the device), and is waited for at its done. A loop's body is run twice: the second time stands for
    all that follow.
    """
    clock = _Clock(costs)
    clock.run(program.operations)

    def by_axes(name: str) -> dict[tuple[str, ...], float]:
        return {key[1]: seconds for key, seconds in clock.spent.items() if key[0] == name}

    total, compute, memory, host, transfer = (
        clock.spent[name,] for name in ("total", "compute", "memory", "host", "transfer")
    )
    return Timeline(total, compute, memory, host, transfer, by_axes("waiting"), by_axes("communication"))


class _Clock:
    def __init__(self, costs: Costs):
        self.costs = costs
        # By the field of a Timeline, and the mesh axes.
        self.spent: defaultdict[tuple[Any, ...], float] = defaultdict(float)
        self.free: dict[str, float] = {}
        self.ends: dict[str, tuple[float, tuple[Any, ...]]] = {}

    def run(self, operations: tuple[Operation, ...]) -> None:
        for operation in operations:
            if operation.body:
                self.repeat(operation.body, operation.trips)
            elif operation.waits_for:
                self.wait(*self.ends.pop(operation.waits_for, (0.0, ("memory",))))
            else:
                self.one(operation)

    def repeat(self, body: tuple[Operation, ...], trips: int) -> None:
        for _ in range(min(trips, 2)):
            before = dict(self.spent)
            self.run(body)
        if trips > 2:
            rest = {key: (seconds - before.get(key, 0.0)) * (trips - 2) for key, seconds in self.spent.items()}
            for key, seconds in rest.items():
                self.spent[key] += seconds
            later = rest.get(("total",), 0.0)
            self.free = {link: time + later for link, time in self.free.items()}
            self.ends = {name: (time + later, key) for name, (time, key) in self.ends.items()}

    def one(self, operation: Operation) -> None:
        collective, own = operation.collective, self.costs.seconds(operation)
        key: tuple[Any, ...]
        if collective:
            self.add(own, "compute")
            seconds = collective.sent_bytes / self.costs.bandwidth(collective.axes)
            self.spent["communication", collective.axes] += seconds
            link, key = "slices" if collective.slow else "devices", ("waiting", collective.axes)
        elif operation.host_bytes:
            seconds = operation.host_bytes / self.costs.host_bandwidth
            self.spent["transfer",] += seconds
            link, key = "host", ("host",)
        elif operation.asynchronous:
            seconds, link, key = own, "memory", ("memory",)
        else:
            self.add(own, "compute")
            return
        end = self.free[link] = max(self.spent["total",], self.free.get(link, 0.0)) + seconds
        if operation.asynchronous:
            self.ends[operation.name] = end, key
        else:
            self.wait(end, key)

    def wait(self, end: float, key: tuple[Any, ...]) -> None:
        self.add(max(end - self.spent["total",], 0.0), *key)

    def add(self, seconds: float, *key: Any) -> None:
        self.spent[key] += seconds
        self.spent["total",] += seconds
