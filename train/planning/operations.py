"""What one device does in a training step: a compiled program as a tree of operations.

Sums over it weigh the body of a loop by its trips, which XLA's own `cost_analysis` does not.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from train.planning.hlo import Array

# Products over all pairs of positions that an attention kernel makes, by a part of its name.
ATTENTION = {"mha_fwd": 2, "mha_dq": 3, "mha_dkv": 4, "SoftmaxBackward": 5, "fmha": 2}


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
        yield from walked(self.operations, 1)

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


def walked(operations: tuple[Operation, ...], times: int) -> Iterator[tuple[Operation, int]]:
    """Each operation that runs no others, with how often it runs."""
    for operation in operations:
        if operation.body:
            yield from walked(operation.body, times * operation.trips)
        else:
            yield operation, times
