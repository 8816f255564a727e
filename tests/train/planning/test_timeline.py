"""The intervals of a simulated step: loops drawn out to all of their passes, and lanes that agree with the sums."""

import math

import pytest

from tests.train.planning.test_operations import CHIP
from train.planning.operations import Collective, Operation, Program
from train.planning.roofline import largest_operations
from train.planning.timeline import Interval, Timeline, timeline

GATHER = Collective("all-gather", ("fsdp",), 2, "f32", 2 * 10**6, "")


def simulated(*operations: Operation) -> Timeline:
    """The time of these operations, with links of 1 MB/s."""
    return timeline(Program(operations, frozenset(), 0, 0, ()), CHIP, lambda axes: 1e6)


def work(name: str, seconds: float) -> Operation:
    """An operation that only computes."""
    return Operation(name, flops=seconds * CHIP.peak_flops)


def lane(line: Timeline, name: str) -> list[tuple[str, float, float]]:
    """(name, start, end) of the intervals of a lane."""
    return [(at.name, round(at.start, 6), round(at.end, 6)) for at in line.intervals if at.lane == name]


def test_what_overlaps_stands_in_lanes_and_what_waits_is_an_interval_of_its_own():
    line = simulated(
        Operation("start", collective=GATHER, asynchronous=True),
        work("a", 0.25),
        Operation("done", waits_for="start"),
        Operation("out", host_bytes=round(0.5 * CHIP.host_bandwidth), asynchronous=True),
        work("b", 2.0),
    )
    assert lane(line, "over fsdp") == [("start", 0.0, 1.0)]
    assert lane(line, "compute") == [("a", 0.0, 0.25), ("b", 1.0, 3.0)]
    assert lane(line, "waiting") == [("done", 0.25, 1.0)]
    assert lane(line, "host") == [("out", 1.0, 1.5)]


def test_of_a_loop_one_pass_is_kept_as_long_as_all_of_them():
    inner = Operation("inner", body=(work("b", 0.5), work("c", 0.25)), trips=4)
    line = simulated(work("a", 1.0), Operation("outer", body=(inner, work("d", 1.0)), trips=3), work("e", 1.0))
    assert line.total == pytest.approx(14.0)
    assert [(at.name, at.passes) for at in line.intervals if at.lane == "loop"] == [("inner", 4), ("outer", 3)]
    assert lane(line, "loop") == [("inner", 1.0, 10.0), ("outer", 1.0, 13.0)]
    assert lane(line, "compute") == [
        ("a", 0.0, 1.0), ("b", 1.0, 7.0), ("c", 7.0, 10.0), ("d", 10.0, 13.0), ("e", 13.0, 14.0)
    ]  # fmt: skip


def test_bodies_that_run_once_or_never_are_no_loops():
    line = simulated(Operation("call", body=(work("a", 1.0),)), Operation("never", body=(work("b", 1.0),), trips=0))
    assert line.intervals == (Interval("compute", "a", 0.0, 1.0),)


def test_the_widths_of_compute_and_waiting_add_up_to_the_step():
    body = (Operation("g", collective=GATHER, asynchronous=True), work("a", 0.75), Operation("h", waits_for="g"))
    line = simulated(Operation("loop", body=body, trips=7), work("b", 0.5))
    widths = {name: sum(end - start for _, start, end in lane(line, name)) for name in ("compute", "waiting")}
    assert widths["compute"] == pytest.approx(line.compute, rel=1e-5)
    assert sum(widths.values()) == pytest.approx(line.total, rel=1e-5)


def test_the_largest_operations_are_those_with_the_most_time_in_all_their_runs():
    product = Operation("p", flops=CHIP.peak_flops, bytes=round(CHIP.memory_bandwidth / 4), source="x/dot_general")
    copies = Operation("m", bytes=round(CHIP.memory_bandwidth))
    moved = Operation("async", bytes=round(9 * CHIP.memory_bandwidth), asynchronous=True)
    program = Program((copies, moved, Operation("loop", body=(product,), trips=3)), frozenset(), 0, 0, ())
    first, second = largest_operations(program, CHIP, 5)
    assert (first.name, first.times, first.source, first.seconds) == ("p", 3, "x/dot_general", pytest.approx(3.0))
    assert first.flops / first.seconds == pytest.approx(CHIP.peak_flops)
    assert first.intensity == pytest.approx(4 * CHIP.peak_flops / CHIP.memory_bandwidth)
    assert (second.name, second.flops, second.intensity) == ("m", 0.0, 0.0)
    assert largest_operations(program, CHIP, 1) == [first]
    assert first._replace(bytes=0.0).intensity == math.inf
