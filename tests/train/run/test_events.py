"""The audit log, and the hook that gets each event."""

import json
import logging
from pathlib import Path

import pytest

from train.run.events import Events, newest_saved_step, read_events


def test_each_event_is_a_line_on_disk_and_a_torn_line_spoils_no_other(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    Events(path).write("start", step=0)
    with path.open("a") as file:
        file.write('{"time": "2026')
    events = Events(path)
    events.write("save", step=4)
    assert [(event["event"], event["step"]) for event in read_events(path)] == [("start", 0), ("save", 4)]
    assert read_events(path)[0]["time"] <= read_events(path)[1]["time"]
    assert read_events(tmp_path / "none") == []
    assert path.read_text().count("\n") == 2
    # A line that lacks no more than its end is kept.
    path.write_text(path.read_text().rstrip())
    events.write("save", step=8)
    assert [event["step"] for event in read_events(path)] == [0, 4, 8]


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([], 0),
        ([("start", 0), ("save", 4)], 0),  # the save may have been killed
        ([("start", 0), ("save", 4), ("crash", 4), ("start", 0), ("save", 4)], 0),
        ([("start", 0), ("save", 4), ("save", 8)], 4),
        ([("start", 0), ("save", 4), ("rollback", 6)], 4),
        ([("start", 0), ("save", 4), ("start", 4)], 4),
        ([("start", 0), ("save", 4), ("stop", 4)], 4),
        ([("start", 0), ("save", 4), ("end", 4), ("start", 0)], 0),  # begun again
        ([("fork", 8), ("save", 12)], 0),
        ([("fork", 8), ("save", 12), ("end", 12)], 12),
    ],
)
def test_the_newest_checkpoint_that_was_surely_complete_is_known(events: list[tuple[str, int]], step: int):
    log = [
        {"event": "start" if name == "fork" else name, "step": at} | ({"fork": {}} if name == "fork" else {"to": 4})
        for name, at in events
    ]
    assert newest_saved_step(log) == step


def test_other_processes_write_nothing():
    Events(None, "exit 1").write("start", step=0)


def test_a_start_that_ended_without_a_word_is_noted_once(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.note_crash(None)
    assert read_events(path) == []
    events.write("start", step=3)
    events.note_crash(4e9)
    events.note_crash(None)
    crashes = read_events(path)[1:]
    assert [(event["event"], event["step"]) for event in crashes] == [("crash", 3)]
    assert crashes[0]["alive_until"] == 4e9
    for last in ("stop", "end", "fault"):
        events.write(last, step=5)
        events.note_crash(4e9)
        assert read_events(path)[-1]["event"] == last


def test_a_hook_gets_each_event_and_cannot_harm(tmp_path: Path, caplog):
    heard = tmp_path / "heard"
    events = Events(tmp_path / "events.jsonl", f"cat >> {heard}; exit 3")
    with caplog.at_level(logging.WARNING, "ziggurat"):
        events.write("start", step=0)
        events.close()
    assert json.loads(heard.read_text()) == read_events(tmp_path / "events.jsonl")[0]
    assert "train.on_event ended with status 3" in caplog.text
    Events(tmp_path / "events.jsonl", "true").write("save", step=1)
    assert len(read_events(tmp_path / "events.jsonl")) == 2
