"""The display of a run's progress, for terminals and logs, and its rate."""

import errno
import io
import logging
import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from train.display import Display, Rate


def test_the_rate_is_of_finished_steps_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.display.time.perf_counter", lambda: now[0])
    rate = Rate(window=3)
    rate.start()
    for seconds in (1.0, 2.0, 2.0, 2.0):
        now[0] += seconds
        rate.finished(1000)
    assert rate.tokens_per_second == pytest.approx(500)
    assert rate.seconds(3000) == pytest.approx(6)
    now[0] += 50
    rate.start()
    now[0] += 1
    rate.finished(1000)
    assert rate.tokens_per_second == pytest.approx(1000)
    # A batch that is passed over counts for the time that is left, not for the speed.
    rate.finished(1000, is_computed=False)
    assert rate.tokens_per_second == pytest.approx(1000)
    assert rate.seconds(4000) == pytest.approx(2)


RECORD = {"step": 10, "loss": 2.5, "tokens_per_second": 1234.5, "peak_share": 0.5, "data_wait_seconds": 0.25}


def shown(terminal: bool, quiet: bool = False, every: int = 10) -> str:
    out = io.StringIO()
    display = Display(40, every, quiet)
    display._console = Console(file=out, force_terminal=terminal, width=160)
    display.begin(0)
    for step in range(1, 12):
        display.step(RECORD | {"step": step}, 90.0)
    display.evaluation(RECORD | {"validation_bits_per_byte": 1.5, "validation_loss": 3.0, "sample": "def f():\n  pass"})
    display.close()
    return out.getvalue()


def test_a_log_has_plain_lines_every_few_steps():
    lines = shown(terminal=False).splitlines()
    assert lines[0].startswith("step 1/40")
    assert lines[1] == "step 10/40  loss 2.5000  1,234 tokens/s  50% of peak  data wait 0.25 s  ETA 1 min 30 s"
    assert lines[2] == "step 10  held-out: 1.500 bits a byte, loss 3.0000; sample:"
    assert lines[3:] == ["    def f():", "      pass"]


@pytest.mark.parametrize("live", [False, True])
def test_an_evaluation_without_a_sample_promises_none(live: bool):
    out = io.StringIO()
    display = Display(40, 10, quiet=False)
    display._console, display._live = Console(file=out, width=160), live
    display.evaluation(RECORD | {"validation_bits_per_byte": 1.5, "validation_loss": 3.0, "sample": ""})
    assert out.getvalue() == "step 10  held-out: 1.500 bits a byte, loss 3.0000\n"


def test_a_terminal_has_a_live_view_and_other_processes_show_nothing():
    assert "█" in shown(terminal=True)
    assert shown(terminal=False, quiet=True) == ""


def view(width: int, height: int, activity: str = "steps", **changes: object) -> list[str]:
    """The lines of a live view after step 10 of 40 and an evaluation."""
    display = Display(40, 10, quiet=False, activity=lambda: activity)
    display._console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)
    display.curve.levels = {"gzip -9": 1.9}
    display.step(RECORD, 90.0)
    display.curve.add({"step": 10, "validation_loss": 3.0, "validation_bits_per_byte": 1.5})
    for name, value in changes.items():
        setattr(display, name, value)
    with display._console.capture() as captured:
        display._console.print(display)
    return captured.get().splitlines()


def test_a_large_terminal_also_has_the_curve_and_leaves_room_for_other_lines():
    lines = view(80, 24)
    assert len(lines) == 13
    assert lines[0] == "step 10/40  loss 2.5000  ETA 1 min 30 s  1,234 tokens/s  data wait 0.25 s"
    assert any("gzip -9 1.900" in line for line in lines)
    assert any("held out 1.500" in line for line in lines)
    assert lines[-1].endswith("· 25%")
    assert all(len(line) <= 80 for line in lines)
    assert [len(view(width, height)) for width, height in ((49, 24), (80, 17), (80, 18), (200, 90))] == [1, 1, 7, 17]


def test_a_view_that_fails_ends_nothing():
    class Failing:
        def draw(self, width: int, height: int, step: int) -> list:
            raise ZeroDivisionError("no scale")

    assert view(80, 24, curve=Failing()) == ["step 10/40  (no view: ZeroDivisionError: no scale)"]


def test_a_terminal_that_became_narrower_is_cleared_of_its_wrapped_lines():
    display = Display(40, 10, quiet=False)
    display._console = Console(file=io.StringIO(), force_terminal=True, width=40, height=24)
    display.begin(0)
    display._drawn = [100, 40, 41]
    with display._console.capture() as captured:
        display._console.print(display)
    display.close()
    assert "\x1b[3A\x1b[J" in captured.get()


def test_a_sample_on_a_terminal_fills_two_lines():
    out = io.StringIO()
    display = Display(40, 10, quiet=False)
    display._console = Console(file=out, force_terminal=True, width=40, height=10)
    display.begin(0)
    sample = "def f():\n\n    pass  # 漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字漢字\n"
    lines = display._sample_lines(sample)
    short = display._sample_lines("a\n  b\n")
    display.close()
    assert len(lines) == 2
    assert lines[0] == "def f(): ↵ pass #"
    assert lines[1].endswith(" …")
    assert cell_len("    " + lines[1]) <= 40
    assert short == ["a ↵ b"]


def test_log_lines_come_above_the_view_and_what_runs_beside_it_may_fail(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    threads: list[threading.Thread] = []
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)

    def fail() -> None:
        threads.append(threading.current_thread())
        raise ValueError("from a thread")

    try:
        display = Display(40, 10, quiet=False)
        display._console._force_terminal = True
        monkeypatch.setattr(Console, "encoding", "utf-8")
        display.begin(0, fail)
        assert handler.stream is not stream
        logging.getLogger().warning("a warning")
        display.close()
        assert handler.stream is stream
        for thread in threads:
            thread.join(10)
    finally:
        logging.getLogger().removeHandler(handler)
    # The line is erased before, and drawn again after.
    assert "\x1b[2Ka warning\nstep 0/40" in stream.getvalue()
    assert len(threads) == 1
    assert not unhandled


@pytest.mark.parametrize(("encoding", "term"), [("ascii", "xterm"), ("utf-8", "dumb")])
def test_a_terminal_that_cannot_show_the_view_gets_plain_lines(encoding: str, term: str, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(Console, "encoding", encoding)
    assert shown(terminal=True) == shown(terminal=False)


@given(st.integers(1, 200), st.sampled_from(["steps", "data", "compile", "evaluation", "checkpoint"]))
def test_the_line_of_a_view_has_the_figures_that_fit_and_names_a_pause(width: int, activity: str):
    display = Display(40, 10, quiet=False, activity=lambda: activity)
    display._console = Console(file=io.StringIO(), force_terminal=True, width=width, height=10)
    display.step(RECORD, 90.0)
    with display._console.capture() as captured:
        display._console.print(display)
    (line,) = captured.get().splitlines()
    assert len(line) <= width
    pause = {"compile": "compiling", "evaluation": "evaluating", "checkpoint": "saving"}.get(activity, "")
    figures = [pause] * bool(pause) + ["loss 2.5000", "ETA 1 min 30 s", "1,234 tokens/s", "data wait 0.25 s"]
    # A figure is never cut: each is there, or no later one is.
    present = [figure in line for figure in figures]
    assert present == sorted(present, reverse=True)
    assert present.count(True) >= sum(width >= columns for columns in (25, 40, 60))


class Closed(io.StringIO):
    """A terminal or pipe that gives this error."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error
        self.redrawn = threading.Semaphore(0)  # counts the tries of the thread that redraws the live line

    def isatty(self) -> bool:
        return True

    def write(self, text: str = "") -> int:
        if threading.current_thread() is not threading.main_thread():
            self.redrawn.release()
        raise self.error

    flush = write  # type: ignore[assignment]


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_standard_error_that_cannot_be_written_ends_nothing(number: int, monkeypatch):
    stream = Closed(OSError(number, os.strerror(number)))
    monkeypatch.setattr(sys, "stderr", stream)
    display = Display(40, 10, quiet=False)
    display.begin(0)
    display.step(RECORD, 90.0)
    display.say("a line")
    assert all(stream.redrawn.acquire(timeout=10) for _ in range(3))
    display.close()


def test_a_step_without_a_trained_token_is_explained_once():
    out = io.StringIO()
    display = Display(40, 1, quiet=False)
    display._console = Console(file=out, width=300)
    for step in (1, 2):
        display.step(RECORD | {"step": step, "loss": None}, 90.0)
    first, *lines = out.getvalue().splitlines()
    assert "raise data.segment_length" in first
    assert [line.split("  ")[1] for line in lines] == ["no token trained on"] * 2
