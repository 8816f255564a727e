"""How long a compiled program takes: its schedule, run at given speeds."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train.planning.operations import Kernel, Operation, Program


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
        """The seconds of one kind, by mesh axes."""
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
        """Run operations one after the other."""
        for operation in operations:
            if operation.body:
                self.repeat(operation.body, operation.trips)
            elif operation.waits_for:
                self.wait(*self.ends.pop(operation.waits_for, (0.0, ("memory",))))
            else:
                self.one(operation)

    def repeat(self, body: tuple[Operation, ...], trips: int) -> None:
        """Run the body of a loop as often as it runs."""
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
        """Run one operation."""
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
        """Let the time pass until then, and note what it was spent on."""
        self.add(max(end - self.spent["total",], 0.0), *key)

    def add(self, seconds: float, *key: Any) -> None:
        """Spend seconds on something."""
        self.spent[key] += seconds
        self.spent["total",] += seconds
