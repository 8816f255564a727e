"""The operations that one device runs in a training step, as a tree with loops.

Sums over the tree weight the body of a loop by its trip count, which XLA's own `cost_analysis` does not.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from train.planning.hlo import Array

# The names of our kernels' operations: a grouped product states the rows that it multiplies, and attention the pairs of
# positions in a head of a row.
GROUPED = re.compile(r"grouped_(?:rows|weights)_(\d+)")
PAIRS = re.compile(r"attention_pairs_(\d+)")
COUNTING_NAME = re.compile(f"{GROUPED.pattern}|{PAIRS.pattern}")
# Number of products over the pairs of positions in an attention kernel, by a part of its name.
ATTENTION_PRODUCTS = {"mha_fwd": 2, "mha_dq": 3, "mha_dkv": 4, "SoftmaxBackward": 5, "fmha": 2}


@dataclass(frozen=True)
class Collective:
    """One communication between devices, and how often a step runs it."""

    kind: str  # all-gather, all-reduce, reduce-scatter, all-to-all or permute
    axes: tuple[str, ...]  # mesh axes along which the devices of a group differ, in the mesh's order; "slice" is slow
    group: int  # number of devices that take part
    dtype: str  # dtype of the largest array
    payload_bytes: int  # bytes of all arrays: the output of an all-gather, the input of other kinds
    source: str  # the operation of the traced program
    count: int = 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run, with the group as a ring."""
        share = 1 if self.kind == "permute" else (self.group - 1) / self.group
        return self.payload_bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Kernel:
    """A custom call that is not a plain matrix product, such as attention."""

    name: str  # name of a Pallas kernel, or the target of the call
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    estimate: float | None  # FLOPs that the kernel itself states (Pallas's `cost_estimate`)
    source: str  # the operation of the traced program

    @property
    def flops(self) -> float:
        """The FLOPs of a grouped product's tiles, those that another kernel states, or else those of attention."""
        if rows := GROUPED.search(self.source):
            return int(rows[1]) * self.flops_of_row
        return self.attention_flops if self.estimate is None else self.estimate

    @property
    def is_grouped(self) -> bool:
        """True for the product of rows with the matrices of their experts (see `model.feedforward.grouped`)."""
        return bool(GROUPED.search(self.source))

    @property
    def flops_of_row(self) -> float:
        """FLOPs of a row of a grouped product, by the experts' matrices or their gradients."""
        matrices = next(array for array in (*self.operands, *self.results) if len(array.dims) == 3)
        return 2.0 * math.prod(matrices.dims[-2:])

    @property
    def attention_flops(self) -> float:
        """FLOPs of an attention kernel's products over the scores that it computes; 0 for other kernels."""
        return 2.0 * self.attention_products * self.scores * self._attention_arrays[0].dims[-1] if self.scores else 0.0

    @property
    def attention_products(self) -> int:
        """Number of products over pairs of positions: 2 forward, more backward, 0 in other kernels."""
        products = next((number for part, number in ATTENTION_PRODUCTS.items() if part in self.name), 0)
        # The one that gives the gradients of queries, too, has a sum of them for each block of keys.
        most_dims = max((len(array.dims) for array in self._attention_arrays), default=0)
        return products + ("mha_dkv" in self.name and any(len(array.dims) > most_dims for array in self.results))

    @property
    def scores(self) -> float:
        """Scores that an attention kernel computes: heads of rows × the pairs of positions that it visits.

        These are all pairs if the program does not say (`visited_pairs`). Splash attention takes [..., H, T, C], cuDNN
        [B, T, H, C]; queries come first, then keys. Other kernels have 0.
        """
        arrays = self._attention_arrays
        if not self.attention_products or len(arrays) < 2:
            return 0.0
        positions = -3 if "fmha" in self.name else -2
        queries, keys = (array.dims[positions] for array in arrays[:2])
        pairs = PAIRS.search(self.source)
        heads = arrays[0].elements / queries / arrays[0].dims[-1]
        return heads * (int(pairs[1]) if pairs else queries * keys)

    @property
    def _attention_arrays(self) -> list[Array]:
        return [array for array in self.operands if len(array.dims) > 2 and re.match(r"b?f\d", array.dtype)]


@dataclass(frozen=True)
class Operation:
    """One instruction of the schedule that takes time; a loop, branch or call holds the operations that it runs."""

    name: str  # name of the instruction in the module
    flops: float = 0.0  # FLOPs of matrix products, 2·M·N·K each, without those of kernels
    eight_bit_flops: float = 0.0  # those of them whose operands have 8 bits
    bytes: int = 0  # bytes read from and written to the device's memory
    cycles: int = 0  # the TPU compiler's estimate with memory traffic and without collectives; 0 if it has none
    collective: Collective | None = None  # the communication that the operation starts, apart from its own computation
    kernel: Kernel | None = None
    host_bytes: int = 0  # bytes moved between the device's memory and the host's
    asynchronous: bool = False  # true if it runs until another operation waits for it
    waits_for: str | None = None  # name of the asynchronous operation that ends with this one
    body: tuple["Operation", ...] = ()
    trips: int = 1  # number of times that the body runs
    source: str = ""  # the operation of the traced program, where the instruction computes something


@dataclass(frozen=True)
class Program:
    """All that one device runs in one execution of a module."""

    operations: tuple[Operation, ...]
    arrays: frozenset[Array]  # every result in memory, that is of all instructions outside fusions
    instructions: int  # number of instructions of the whole module, a measure of its size
    aliases: int  # number of results that reuse the memory of an argument
    notes: tuple[str, ...]  # sentences about parts that could not be read

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective of the module, with its count in a step."""
        return tuple(replace(o.collective, count=times) for o, times in walked(self.operations) if o.collective)

    @cached_property
    def kernels(self) -> dict[Kernel, int]:
        """The number of runs in a step by kernel."""
        counts: Counter[Kernel] = Counter()
        for operation, times in walked(self.operations):
            if operation.kernel:
                counts[operation.kernel] += times
        return counts


def walked(operations: tuple[Operation, ...], times: int = 1) -> Iterator[tuple[Operation, int]]:
    """Yields every operation without a body, and how often it runs."""
    for operation in operations:
        if operation.body:
            yield from walked(operation.body, times * operation.trips)
        else:
            yield operation, times


def total(operations: tuple[Operation, ...], figure: str) -> float:
    """Returns the sum of an attribute, such as `flops`, over all operations, each as often as it runs."""
    return sum(getattr(operation, figure) * times for operation, times in walked(operations))
