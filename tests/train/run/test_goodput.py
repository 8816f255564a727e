"""Time accounts and goodput, over restarts."""

import datetime

from hypothesis import given
from hypothesis import strategies as st

from train.run.goodput import TimeAccount, duration, goodput, shares


def event(at: float, name: str, **fields: object) -> dict:
    time = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds")
    return {"time": time, "event": name} | fields


def test_an_account_gives_every_second_to_one_kind():
    now = 100.0
    account = TimeAccount(lambda: now)
    for kind, seconds in (("compile", 3.0), ("data", 5.0), ("steps", 1.0), ("data", 10.0), ("steps", 2.0)):
        now += seconds
        account.switch_to(kind)
    now += 20.0
    assert account.seconds() == {
        "steps": 30.0, "data": 3.0, "evaluation": 0.0, "checkpoint": 0.0, "compile": 5.0, "init": 3.0,
        "lost": 0.0,
    }  # fmt: skip
    assert sum(account.seconds().values()) == now - 100.0


def test_steps_that_a_rollback_undoes_are_lost():
    now = 0.0
    account = TimeAccount(lambda: now)
    account.switch_to("steps")
    now += 7.0
    account.mark_saved()
    now += 5.0
    account.switch_to("checkpoint")
    account.discard_unsaved()
    now += 1.0
    account.switch_to("steps")
    now += 2.0
    account.discard_unsaved()
    seconds = account.seconds()
    assert (seconds["steps"], seconds["lost"], seconds["checkpoint"]) == (7.0, 7.0, 1.0)


def test_a_run_that_crashed_failed_and_was_stopped_is_accounted_for_to_the_second():
    events = [
        event(1000, "start", seconds={"init": 10}),
        event(1050, "save", seconds={"init": 10, "compile": 20, "steps": 30}),
        # Killed at 1080, started again at 1100.
        event(1110, "crash", alive_until=1080),
        event(1110, "start", seconds={"init": 10}),
        # A fault before anything is saved: all but the beginning is lost.
        event(1140, "fault", seconds={"init": 10, "steps": 30}),
        event(1160, "start", seconds={"init": 15}),
        event(1200, "save", seconds={"init": 15, "steps": 40}),
        event(1210, "stop", seconds={"init": 15, "steps": 45, "checkpoint": 5}),
        event(1300, "start", seconds={"init": 10}),
        event(1400, "end", seconds={"init": 10, "steps": 100}),
    ]
    totals = goodput(events)
    assert totals == {
        "steps": 175, "data": 0, "evaluation": 0, "checkpoint": 5, "compile": 20, "init": 45,
        "lost": 30 + 30, "down": 20 + 5 + 80,
    }  # fmt: skip
    # From the beginning of the first start to the end.
    assert sum(totals.values()) == 1400 - 990


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_a_save_that_the_next_start_does_not_find_keeps_no_step(starts):
    """Each start saves every 100 steps of a second each, and is killed; its last saves may be incomplete."""
    events, now, step, kept = [], 1000, 0, 0
    for saves, lost in starts:
        events.append(event(now, "start", step=step, seconds={"init": 0}))
        for i in range(1, saves + 1):
            events.append(event(now + 100 * i, "save", step=step + 100 * i, seconds={"steps": 100 * i}))
        now += 100 * saves + 50
        events.append(event(now + 10, "crash", step=step + 100 * saves, alive_until=now))
        complete = max(saves - lost, 0)
        step, kept, now = step + 100 * complete, kept + 100 * complete, now + 10
    events.append(event(now, "start", step=step, seconds={"init": 0}))
    totals = goodput(events)
    assert totals["steps"] == kept == step
    assert totals["down"] == 10 * len(starts)
    assert sum(totals.values()) == now - 1000


def test_a_run_that_continues_is_known_up_to_its_last_save():
    events = [event(0, "start", seconds={"init": 4}), event(9, "save", seconds={"init": 4, "steps": 9})]
    assert goodput(events)["steps"] == 9
    assert goodput([]) == {}


def test_shares_leave_out_small_activities_but_never_the_steps():
    assert shares({"steps": 94.0, "data": 0.4, "init": 2.0, "down": 3.6}) == "1 min 40 s: 94% steps, 2% init, 4% down"
    assert shares({"steps": 0.0, "init": 20.0}) == "20 s: 0% steps, 100% init"


def test_durations_are_written_as_people_do():
    assert [duration(s) for s in (4.4, 75, 3600 * 5 + 120)] == ["4 s", "1 min 15 s", "5 h 2 min"]
