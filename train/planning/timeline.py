"""The time of a compiled program: its schedule, simulated at a chip's speeds."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.devices.hardware import Chip
from train.planning.operations import Operation, Program
from train.planning.speed import Bandwidth, own_seconds


class Interval(NamedTuple):
    """One thing that a device, or a link of its own, does in a step; times are in seconds from the step's begin.

    Of a loop only the first pass is kept, drawn out over the time of all passes, with an interval `loop` around it.
    """

    lane: str  # compute, waiting, memory, host, loop, or the mesh axes of a communication, as in "over data × fsdp"
    name: str  # name of the instruction in the module
    start: float
    end: float
    passes: int = 1  # number of times that a loop's body runs


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
    intervals: tuple[Interval, ...]


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
    intervals = tuple(clock.intervals)
    return Timeline(**sums, waiting=by_axes("waiting"), communication=by_axes("communication"), intervals=intervals)


class _Clock:
    def __init__(self, chip: Chip, bandwidth: Bandwidth):
        self.chip = chip
        self.bandwidth = bandwidth
        # Seconds by (field of Timeline, and mesh axes if it has them).
        self.spent: defaultdict[tuple[Any, ...], float] = defaultdict(float)
        self.free: dict[str, float] = {}
        self.ends: dict[str, tuple[float, tuple[Any, ...]]] = {}
        self.intervals: list[Interval] = []

    def run(self, operations: tuple[Operation, ...]) -> None:
        for operation in operations:
            if operation.body:
                self.repeat(operation.name, operation.body, operation.trips)
            elif operation.waits_for:
                self.wait(operation.name, *self.ends.pop(operation.waits_for, (0.0, ("memory",))))
            else:
                self.one(operation)

    def repeat(self, name: str, body: tuple[Operation, ...], trips: int) -> None:
        start, earlier = self.spent["total",], self.intervals
        passes: list[tuple[float, list[Interval]]] = []
        for _ in range(min(trips, 2)):
            before = dict(self.spent)
            self.intervals = []
            self.run(body)
            passes.append((self.spent["total",], self.intervals))
        if trips > 2:
            remaining = {key: (seconds - before.get(key, 0.0)) * (trips - 2) for key, seconds in self.spent.items()}
            for key, seconds in remaining.items():
                self.spent[key] += seconds
            later = remaining.get(("total",), 0.0)
            self.free = {link: time + later for link, time in self.free.items()}
            self.ends = {name: (time + later, key) for name, (time, key) in self.ends.items()}
        self.intervals = earlier
        if passes:
            first_end, first_pass = passes[0]
            self.draw_out(first_pass, start, first_end)
            if trips > 1:
                self.note("loop", name, start, self.spent["total",], trips)

    def one(self, operation: Operation) -> None:
        collective = operation.collective
        own = own_seconds(operation, self.chip)
        key: tuple[Any, ...]
        if collective:
            self.add(operation.name, own, "compute")
            seconds = collective.sent_bytes / self.bandwidth(collective.axes)
            self.spent["communication", collective.axes] += seconds
            link, key = "slices" if "slice" in collective.axes else "devices", ("waiting", collective.axes)
            lane = f"over {' × '.join(collective.axes)}"
        elif operation.host_bytes:
            seconds = operation.host_bytes / self.chip.host_bandwidth
            self.spent["transfer",] += seconds
            link, key, lane = "host", ("host",), "host"
        elif operation.asynchronous:
            seconds, link, key, lane = own, "memory", ("memory",), "memory"
        else:
            self.add(operation.name, own, "compute")
            return
        end = self.free[link] = max(self.spent["total",], self.free.get(link, 0.0)) + seconds
        self.note(lane, operation.name, end - seconds, end)
        if operation.asynchronous:
            self.ends[operation.name] = end, key
        else:
            self.wait(operation.name, end, key)

    def wait(self, name: str, end: float, key: tuple[Any, ...]) -> None:
        self.add(name, max(end - self.spent["total",], 0.0), *key)

    def add(self, name: str, seconds: float, *key: Any) -> None:
        start = self.spent["total",]
        self.note("compute" if key == ("compute",) else "waiting", name, start, start + seconds)
        self.spent[key] += seconds
        self.spent["total",] += seconds

    def note(self, lane: str, name: str, start: float, end: float, passes: int = 1) -> None:
        if end > start:
            self.intervals.append(Interval(lane, name, start, end, passes))

    def draw_out(self, first_pass: list[Interval], start: float, end: float) -> None:
        """Adds the intervals of a loop's first pass, from `start` to `end`, drawn out to the end of all passes."""
        factor = (self.spent["total",] - start) / (end - start) if end > start else 1.0
        for at in first_pass:
            drawn = [start + (time - start) * factor for time in (at.start, at.end)]
            self.note(at.lane, at.name, drawn[0], drawn[1], at.passes)
