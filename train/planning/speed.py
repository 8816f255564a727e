"""The model of time: how long a chip takes for one operation of a compiled program.

The TPU compiler states the cycles of all but kernels. Anything else takes as long as the slowest resource that it
needs, at the share of the data sheet's figure that programs reach. Shares are fitted to the steps of
`tests/benchmarks/truth.py` that are set aside for that.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from train.devices.hardware import CHIPS, Chip
from train.planning.operations import Operation
from train.planning.topology import bandwidth_over

# Function from mesh axes to the bytes/s that a device sends along them.
Bandwidth = Callable[[tuple[str, ...]], float]


class Reached(NamedTuple):
    """Shares of a data sheet's figures that programs reach."""

    products: float = 1.0  # of the FLOP/s, by matrix products without cycles of the compiler's
    forward: float = 1.0  # of the FLOP/s, by attention kernels forward
    backward: float = 1.0  # and backward
    memory: float = 1.0  # of the memory's bandwidth
    links: float = 1.0  # of the links' bandwidth


# The figures of devices that have no data sheet here are measured.
REACHED = {"tpu": Reached(), "gpu": Reached(products=0.65, forward=0.55, backward=0.45, memory=0.9, links=0.8)}
# Vector operations of splash attention for a score, forward and backward. They follow from its measured time on a v6e
# (9.41 and 13.87 ms for 4.03e9 scores), where they take longer than the products.
VECTOR_OPERATIONS = (17, 25)
# The largest error of the estimates of steps that others have measured (docs/scaling.md). Of a TPU7x, which lowers its
# clock to save power, one measured step was found (10% above its estimate): a guess, twice that of the other TPUs.
LARGEST_ERROR = {"tpu": 0.16, "gpu": 0.25, "tpu7x": 0.32}


def reached(chip: Chip) -> Reached:
    """Returns the shares for a chip."""
    return REACHED[chip.platform] if chip.name in CHIPS else Reached()


def reached_bandwidth(mesh: Mesh, chip: Chip) -> Bandwidth:
    """Returns the function from mesh axes to the bytes/s that a device of the mesh sends along them in fact."""
    return functools.cache(lambda axes: bandwidth_over(mesh, axes, chip) * reached(chip).links)


def seconds_range(seconds: float, chip: Chip) -> tuple[float, float] | None:
    """Returns (the least, the most) seconds that a step takes of which these are estimated, or None without errors."""
    if chip.name not in CHIPS:
        return None
    error = LARGEST_ERROR.get(chip.name, LARGEST_ERROR[chip.platform])
    return seconds / (1 + error), seconds / (1 - error)


def own_seconds(operation: Operation, chip: Chip) -> float:
    """Returns the seconds of an operation's own work, without communication."""
    if operation.cycles and chip.cycles_per_second:
        return operation.cycles / chip.cycles_per_second
    seconds = operation.bytes / chip.memory_bandwidth / reached(chip).memory
    kernel = operation.kernel
    if kernel and kernel.scores:
        is_backward = kernel.attention_products > 2
        return max(seconds, attention_seconds(is_backward, kernel.attention_flops, kernel.scores, chip))
    flops = kernel.flops if kernel else operation.flops
    return max(seconds, chip.product_seconds(flops, operation.eight_bit_flops) / reached(chip).products)


def attention_seconds(is_backward: bool, flops: float, scores: float, chip: Chip) -> float:
    """Returns the seconds of an attention kernel: of its products, or on a TPU of its softmax if that takes longer.

    Args:
        is_backward: true for a kernel that gives gradients.
        flops: FLOPs of its products.
        scores: number of scores that it computes, over all rows and heads.
        chip: the chip that computes them.
    """
    share = reached(chip).backward if is_backward else reached(chip).forward
    seconds = flops / chip.peak_flops / share
    if not chip.vector_units:
        return seconds
    return max(seconds, scores * VECTOR_OPERATIONS[is_backward] / chip.vector_units / chip.cycles_per_second)
