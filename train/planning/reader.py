"""Reads the text of a compiled program into the operations that one device runs.

XLA's optimized module is scheduled: the instructions of a computation are listed in the order in which they run, loops
and branches name the computations that they run, and an asynchronous operation has a start and a done. Modules for
TPU, GPU and CPU are read alike.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from model.feedforward.experts import FURTHER_BLOCKS
from train.planning import hlo
from train.planning.hlo import DEVICE, HOST, Array, Computation, Instruction, arrays_of, numbers
from train.planning.operations import Collective, Kernel, Operation, Program, total, walked

COPY_OPCODES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")
FREE_OPCODES = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "add-dependency", "recv", "send-done", "async-update", "call-update", "domain",
}  # fmt: skip
FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceId", "ZeroCrop", "Sharding"}
# The compiler has no real estimate above this, ten minutes of a TPU.
MOST_CYCLES = 10**12


def read_program(text: str, mesh_shape: Mapping[str, int]) -> Program:
    """Reads a compiled module's `as_text()`, whose partition i is device i of the flattened mesh or of one slice."""
    reader = _Reader(text, mesh_shape)
    operations = reader.operations(reader.entry)
    instructions = sum(map(len, reader.computations.values()))
    aliases = len(re.findall(r"(?:may|must)-alias", reader.head))
    return Program(operations, frozenset(reader.arrays), instructions, aliases, tuple(dict.fromkeys(reader.notes)))


class _Reader:
    def __init__(self, text: str, mesh_shape: Mapping[str, int]):
        self.mesh_shape = mesh_shape
        self.computations, self.entry = hlo.computations_of(text)
        self.head = text.partition("\n")[0]
        partitions = re.search(r"num_partitions=(\d+)", self.head)
        self.devices = int(partitions[1]) if partitions else math.prod(mesh_shape.values())
        self.notes: list[str] = []
        self.arrays: set[Array] = set()
        self.operations_of: dict[str, tuple[Operation, ...]] = {}

    def operations(self, name: str) -> tuple[Operation, ...]:
        if name not in self.operations_of:
            computation = self.computations[name]
            # Maps the channel of a started all-gather, and the key of a send, to the operation's name.
            started: dict[int | None, str] = {}
            sends = {_rendezvous(i): i.name for i in computation.values() if i.opcode == "send"}
            operations = []
            for at in computation.values():
                self.arrays.update(at.results)
                if at.opcode not in FREE_OPCODES and at.target not in FREE_TARGETS:
                    operations.append(self.operation(at, started, sends))
            self.operations_of[name] = tuple(operations)
        return self.operations_of[name]

    def operation(self, at: Instruction, started: dict[int | None, str], sends: dict[str, str]) -> Operation:
        """Reads one instruction, as far as it costs anything."""
        opcode = at.opcode.removesuffix("-start")
        starts = at.opcode.endswith("-start")
        if opcode == "while":
            return Operation(at.name, body=self.operations(at.called("body")[0]), trips=self.trips(at))
        if opcode == "conditional":
            branches = at.called("branch_computations", "true_computation", "false_computation")
            return Operation(at.name, body=max(map(self.operations, branches), key=_weight))
        if opcode == "call":
            body = self.operations(at.called("to_apply", "calls")[0])
            apart = next((o.collective for o, _ in walked(body) if o.collective), None) if starts else None
            return Operation(at.name, collective=apart, asynchronous=True) if apart else Operation(at.name, body=body)
        if opcode.endswith("-done"):
            before = at.operands[0]
            if opcode == "recv-done":
                before = sends.get(_rendezvous(at.computation[before]), before)
            return Operation(at.name, waits_for=before)
        if opcode == "send" and not at.kind:
            return self.sent(at)
        if opcode in COPY_OPCODES:
            return self.copied(at, starts)

        parts = [at, *self.inside(at)]
        flops = sum(map(_flops, parts))
        eight_bit = sum(_flops(part) for part in parts if _has_eight_bits(part))
        operation = Operation(
            at.name, flops, eight_bit, self.bytes(at), self.cycles(at), kernel=_kernel(at), source=at.source
        )
        holder = next((i for i in parts if i.kind), None)
        if holder is None:
            return operation
        # The TPU compiler spreads an all-gather over several fusions: the first starts it, the last ends it.
        channel = holder.number("channel_id")
        targets = {i.target for i in parts}
        if "AsyncCollectiveDone" in targets:
            return Operation(at.name, waits_for=started.pop(channel, at.name))
        if channel in started:
            return operation
        if "AsyncCollectiveStart" in targets:
            started[channel] = at.name
            starts = True
        elif starts or opcode == "send":
            starts = not at.find(r'"is_sync":\s*(true)')
        collective = self.collective(holder, at)
        # Memory traffic without a product is part of the communication itself.
        bytes_ = operation.bytes if flops else 0
        return replace(operation, bytes=bytes_, collective=collective, asynchronous=starts and collective is not None)

    def inside(self, at: Instruction) -> Iterator[Instruction]:
        """Yields every instruction inside a fusion or wrapper."""
        for name in at.called("calls"):
            for instruction in self.computations[name].values():
                yield instruction
                yield from self.inside(instruction)

    def collective(self, at: Instruction, outer: Instruction) -> Collective | None:
        """Returns the communication of an instruction, or None if no data leaves the device."""
        groups = hlo.device_groups(at.rest, self.devices)
        kind = at.kind
        operands = at.inputs
        if "source_target_pairs={}" in at.rest:
            self.notes.append(f"{at.name}: no device sends anything, so its result is all zeros ({at.source})")
        if groups.size == 0 or groups.shape[1] == 1 or not operands:
            return None
        assert kind
        if kind == "all-reduce" and at is not outer:
            # On TPU a reduce-scatter within a group is a fusion that returns only a slice of the all-reduce.
            for summed in (at, *at.users):
                if any(i.opcode == "dynamic-slice" and i.operands[0] == summed.name for i in summed.users):
                    kind = "reduce-scatter"
        places = np.unravel_index(groups, tuple(self.mesh_shape.values()))
        axes = tuple(axis for axis, x in zip(self.mesh_shape, places, strict=True) if (x != x[:, :1]).any())
        size = groups.shape[1]
        payload = sum(array.bytes for array in operands) * (size if kind == "all-gather" else 1)
        dtype = max(operands, key=lambda array: array.bytes).dtype
        return Collective(kind, axes, size, dtype, payload, at.source or outer.source)

    def sent(self, at: Instruction) -> Operation:
        """Reads a send to the host, or to the runtime that carries out collectives between slices."""
        array = at.inputs[0]
        transfer = at.find(r'_xla_megascale_transfer_type="(\w+)"')
        if not transfer:
            return Operation(at.name, host_bytes=array.bytes, asynchronous=True)
        slices = math.prod(self.mesh_shape.values()) // self.devices
        kind = transfer.lower().replace("_", "-")
        kind = kind if kind in hlo.COLLECTIVE_KINDS else "all-to-all"
        payload = array.bytes * (slices if kind == "all-gather" else 1)
        collective = Collective(kind, ("slice",), slices, array.dtype, payload, at.source)
        return Operation(at.name, collective=collective, asynchronous=True)

    def copied(self, at: Instruction, asynchronous: bool) -> Operation:
        """Reads a copy of an array or of a part, within the device's memory or to or from the host's."""
        operands = at.inputs
        kind = at.opcode.removesuffix("-start")
        if kind == "dynamic-update-slice":
            into, before = operands[:2]
            moved = before.bytes
        else:
            # The result tuple of a slice-start begins with its operands.
            before, into = operands[0], at.results[len(operands) if asynchronous and kind != "copy" else 0]
            moved = into.bytes
        spaces = {before.space, into.space}
        if HOST in spaces and spaces != {HOST}:
            return Operation(at.name, host_bytes=moved, asynchronous=asynchronous)
        sides = 2 if spaces == {DEVICE} else int(DEVICE in spaces)
        return Operation(at.name, bytes=moved * sides, cycles=self.cycles(at), asynchronous=asynchronous)

    def cycles(self, at: Instruction) -> int:
        if at.opcode == "reduce":
            # The compiler's estimate for a plain sum is ten times what it takes, which is the time of its memory.
            return 0
        cycles = at.number("estimated_cycles") or 0
        if cycles > MOST_CYCLES:
            self.notes.append(f"{at.name.partition('.')[0]}: the compiler's estimate of {cycles} cycles is ignored")
        return cycles if cycles <= MOST_CYCLES else 0

    def bytes(self, at: Instruction) -> int:
        """Returns the bytes of device memory that an instruction moves; a slice or update counts only its part."""
        operands = [at.computation[name].results for name in at.operands if name in at.computation]
        if at.opcode in ("gather", "reshape"):
            return 2 * _in_memory(at.results)
        if at.opcode == "scatter":
            return 2 * sum(map(_in_memory, operands[1:]))
        if not (at.opcode.startswith("fusion") and at.called("calls")):
            return sum(map(_in_memory, [*operands, at.results]))
        body = self.computations[at.called("calls")[0]]
        parameters = [i for i in body.values() if i.opcode == "parameter"]
        moved = sum(min(_in_memory(operands[int(i.inner)]), _part(i)) for i in parameters)
        root = next(i for i in body.values() if i.is_root)
        roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        # The result tuple of a fusion-start begins with its operands.
        skipped = sum(map(len, operands)) if at.opcode == "fusion-start" else 0
        for array, result in zip(at.results[skipped:], roots, strict=False):
            while result.opcode in ("bitcast", "convert", "copy"):
                result = body[result.operands[0]]
            updates = {"dynamic-update-slice": slice(1, 2), "scatter": slice(2, 3)}.get(result.opcode)
            part = (array,) if updates is None else arrays_of(body, result.operands[updates])
            moved += min(_in_memory((array,)), sum(x.bytes for x in part))
        return int(moved)

    def trips(self, at: Instruction) -> int:
        """Returns a loop's trip count: from XLA, or else from constant bound, start and step of its counter."""
        known = at.number("known_trip_count")
        if known is not None:
            return known
        if FURTHER_BLOCKS in at.source:
            self.notes.append("blocks of rows that only an unbalanced router of experts needs are not counted")
            return 0
        condition, body = (self.computations[at.called(key)[0]] for key in ("condition", "body"))
        compare, after = (next(i for i in c.values() if i.is_root) for c in (condition, body))
        constants = [_constant(condition, name) for name in compare.operands]
        limit = next((constant for constant in constants if constant is not None), None)
        counters = [i.number("index") for i in map(condition.get, compare.operands) if i and i.opcode != "constant"]
        if limit is None or len(counters) != 1 or counters[0] is None or "direction=GE" in compare.rest:
            self.notes.append(f"{at.name}: the program does not state its trip count; it is counted once")
            return 1
        before = at.computation[at.operands[0]]
        first = _constant(at.computation, before.operands[counters[0]]) if before.opcode == "tuple" else 0
        change = body[after.operands[counters[0]]] if after.opcode == "tuple" else after
        steps = [_constant(body, name) for name in change.operands] if change.opcode == "add" else []
        step = next((number for number in steps if number), 1)
        distance = abs(limit - (first or 0)) + ("direction=LE" in compare.rest)
        return -(-distance // abs(step))


def _weight(operations: tuple[Operation, ...]) -> tuple[float, ...]:
    return tuple(total(operations, figure) for figure in ("cycles", "flops", "bytes"))


def _kernel(at: Instruction) -> Kernel | None:
    """Returns the kernel that an instruction calls, if it calls one."""
    if at.opcode != "custom-call" or at.is_product:
        return None
    estimate = at.find(r'cost_estimate"?:\s*\{[^}]*?"flops":\s*"?(\d+)')
    name = re.sub(r"(\.(\d+|clone|remat\d*))+$", "", at.name) if at.target == "tpu_custom_call" else at.target
    return Kernel(name, at.inputs, at.results, float(estimate) if estimate else None, at.source)


def _flops(at: Instruction) -> float:
    """Returns 2·M·N·K of a matrix product in any of its notations."""
    if at.opcode == "convolution":
        return _convolution_flops(at)
    if at.opcode != "dot" and not at.is_product:
        return 0.0
    dims = at.inputs[0].dims
    contracted = numbers(at.find(r'lhs_contracting_dim\w*"?[=:]\s*[\[{]([^\]}]*)'))
    if at.is_product and not contracted:
        contracted = [len(dims) - 1]
    return 2.0 * at.results[0].elements * math.prod(dims[axis] for axis in contracted)


def _has_eight_bits(at: Instruction) -> bool:
    return bool(at.inputs) and re.match(r"f8|s8", at.inputs[0].dtype) is not None


def _rendezvous(at: Instruction) -> str:
    """Returns the key that a send shares with its recv."""
    return at.find(r'rendezvous="([^"]*)"') or str(at.number("channel_id"))


def _in_memory(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == DEVICE)


def _part(at: Instruction) -> float:
    """Returns the bytes that a fusion reads of a parameter if it only slices it, or infinity."""
    read = 0.0
    for user in at.users:
        in_place = user.operands[0] == at.name
        if user.opcode == "bitcast":
            read += _part(user)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and in_place:
            read += sum(array.bytes for array in user.results)
        elif not (user.opcode in ("dynamic-update-slice", "scatter") and in_place):
            return math.inf
    return read


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the value of an integer constant, seen through copies."""
    at = computation.get(name)
    while at and at.opcode in ("copy", "bitcast", "convert"):
        at = computation.get(at.operands[0])
    return int(at.inner) if at and at.opcode == "constant" and re.fullmatch(r"-?\d+", at.inner) else None


def _convolution_flops(at: Instruction) -> float:
    """Returns the FLOPs of a matrix product written as a convolution.

    Its batch, contracted and free dimensions may each be a window; padding of a window is not counted.
    """
    left, right = at.inputs[:2]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.rest)
    assert labels
    of_left, of_right, of_result = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", at.find(r"window=\{([^}]*)\}")))
    flops = 2.0 * right.dims[of_right.index("i")] * right.dims[of_right.index("o")] * left.dims[of_left.index("b")]
    flops /= at.number("batch_group_count") or 1
    for i in range(len(of_left) - 2):
        stride, spread, dilation, low = (
            int(window[name].split("x")[i].split("_")[0]) if name in window else default
            for name, default in (("stride", 1), ("lhs_dilate", 1), ("rhs_dilate", 1), ("pad", 0))
        )
        base, kernel = left.dims[of_left.index(str(i))], right.dims[of_right.index(str(i))]
        out = np.arange(at.results[0].dims[of_result.index(str(i))]) * stride - low
        places = (out + k * dilation for k in range(kernel))
        flops *= sum(int(((x >= 0) & (x <= (base - 1) * spread) & (x % spread == 0)).sum()) for x in places)
    return flops
