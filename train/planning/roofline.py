"""The operations that take most of a step, and where they lie below a chip's roofline (Williams et al. 2009)."""

from typing import NamedTuple

from train.devices.hardware import Chip
from train.planning.operations import Program, walked
from train.planning.speed import own_seconds


class Work(NamedTuple):
    """All runs of one operation in a step of one device, without communication."""

    name: str  # name of the instruction in the module
    source: str  # the operation of the traced program
    times: int  # number of runs
    seconds: float  # time of all runs
    flops: float  # FLOPs of all runs' matrix products and kernels
    bytes: float  # bytes that all runs read from and write to the device's memory

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of memory traffic; infinite without any."""
        return self.flops / self.bytes if self.bytes else float("inf")


def largest_operations(program: Program, chip: Chip, most: int) -> list[Work]:
    """Returns the operations that take the most time, at most `most`, the longest first."""
    works = []
    for operation, times in walked(program.operations):
        seconds = times * own_seconds(operation, chip)
        if seconds and not operation.asynchronous:
            kernel, collective = operation.kernel, operation.collective
            flops = operation.flops + (kernel.flops if kernel else 0.0)
            source = operation.source or (collective.source if collective else "")
            works.append(Work(operation.name, source, times, seconds, times * flops, times * float(operation.bytes)))
    return sorted(works, key=lambda work: -work.seconds)[:most]
