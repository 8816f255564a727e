"""The time of a compiled program: its schedule, simulated at a chip's speeds."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.devices.hardware import Chip
from train.planning.operations import Operation, Program

# Function from mesh axes to the bytes/s that a device sends along them.
Bandwidth = Callable[[tuple[str, ...]], float]


@dataclass(frozen=True)
class Timeline:
    """The seconds of a step: `total` is the sum of `compute`, all of `waiting`, `memory` and `host`."""

    total: float
    compute: float  # seconds of fusions, products and kernels
    memory: float  # exposed seconds of copies within the device's memory
    host: float  # exposed seconds of copies to and from the host
    transfer: float  # seconds of all copies to and from the host, hidden or exposed
    waiting: dict[tuple[str, ...], float]  # exposed seconds of communication, by mesh axes
    communication: dict[tuple[str, ...], float]  # seconds of all communication, hidden or exposed, by mesh axes


def own_seconds(operation: Operation, chip: Chip) -> float:
    """Returns the seconds of an operation's own work, by the compiler's cycles or else by a roofline."""
    if operation.cycles and chip.cycles_per_second:
        return operation.cycles / chip.cycles_per_second
    flops = operation.kernel.flops if operation.kernel else operation.flops
    return max(chip.product_seconds(flops, operation.eight_bit_flops), operation.bytes / chip.memory_bandwidth)


def timeline(program: Program, chip: Chip, bandwidth: Bandwidth) -> Timeline:
    """Simulates the schedule as the compiler wrote it: in sequence, except for asynchronous operations.

    An asynchronous operation starts once the link that it needs is free (one within slices, one between them, one to
    the host, one within the device), and its done waits for it. The body of a loop is simulated twice; the second pass
    represents all that follow.
    """
    clock = _Clock(chip, bandwidth)
    clock.run(program.operations)

    def by_axes(name: str) -> dict[tuple[str, ...], float]:
        return {key[1]: seconds for key, seconds in clock.spent.items() if key[0] == name}

    sums = {name: clock.spent[name,] for name in ("total", "compute", "memory", "host", "transfer")}
    return Timeline(**sums, waiting=by_axes("waiting"), communication=by_axes("communication"))


class _Clock:
    def __init__(self, chip: Chip, bandwidth: Bandwidth):
        self.chip = chip
        self.bandwidth = bandwidth
        # Seconds by (field of Timeline, and mesh axes if it has them).
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
            remaining = {key: (seconds - before.get(key, 0.0)) * (trips - 2) for key, seconds in self.spent.items()}
            for key, seconds in remaining.items():
                self.spent[key] += seconds
            later = remaining.get(("total",), 0.0)
            self.free = {link: time + later for link, time in self.free.items()}
            self.ends = {name: (time + later, key) for name, (time, key) in self.ends.items()}

    def one(self, operation: Operation) -> None:
        collective = operation.collective
        own = own_seconds(operation, self.chip)
        key: tuple[Any, ...]
        if collective:
            self.add(own, "compute")
            seconds = collective.sent_bytes / self.bandwidth(collective.axes)
            self.spent["communication", collective.axes] += seconds
            link, key = "slices" if "slice" in collective.axes else "devices", ("waiting", collective.axes)
        elif operation.host_bytes:
            seconds = operation.host_bytes / self.chip.host_bandwidth
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
