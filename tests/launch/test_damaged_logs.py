"""Damaged files in a run's folder: logs lose the lines that are damaged, other files are named or made again."""

import json
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train.run.events
import train.run.json_lines
from data.errors import InputError
from launch.page.report_page import make_page
from launch.summary import summary
from tests.launch.small_run import here, metrics
from train.run.events import Events, read_events
from train.run.folder import HeldOutDocument, Run
from train.run.ledger import read_ledger
from train.run.step_log import StepLog, read_positions

LOGS = ("events.jsonl", "metrics.jsonl", "positions.jsonl")
BAD_LINES = [b"", b"5", b"[]", b"{}", b"null", b"\xff\xfe", b"\0" * 40, b'{"step": 3', b"[" * 10**5, b"1" * 5000]
BAD_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**30) | st.just(-1)
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(), st.integers() | st.none(), max_size=2)
)  # fmt: skip


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_line_of_a_log_costs_that_line_alone(finished: Path, data):
    with tempfile.TemporaryDirectory() as folder:
        run = Run.load(Path(shutil.copytree(finished, f"{folder}/run", ignore=shutil.ignore_patterns("checkpoints"))))[
            0
        ]
        name = data.draw(st.sampled_from(LOGS))
        path = run.folder / name
        lines = path.read_bytes().splitlines()
        i = data.draw(st.integers(0, len(lines) - 1))
        record = json.loads(lines[i])
        if data.draw(st.booleans()):
            bad = data.draw(st.sampled_from([*BAD_LINES, lines[i][:-9]]))
        else:
            field = data.draw(st.sampled_from(sorted(record)))
            bad = json.dumps(record | {field: data.draw(BAD_VALUES)}).encode()
        path.write_bytes(b"\n".join([*lines[:i], bad, *lines[i + 1 :]]) + b"\n")
        make_page(run)
        summary(run, "ziggurat")
        if name == "events.jsonl":
            assert len(read_events(path)) >= len(lines) - 1
            events = Events(path)
            events.note_crash(None)
            events.write("start", step=0)
            assert len(read_events(path)) >= len(lines)
        else:
            StepLog(path, 100).close()
            kept = [line for line in path.read_bytes().splitlines() if line != bad]
            assert kept == lines[:i] + lines[i + 1 :]
        logged = [json.loads(line) for line in (finished / "positions.jsonl").read_text().splitlines()]
        shape = np.array(logged[0]["positions"]).shape
        assert len(read_positions(run.positions, shape)) >= len(logged) - 1


def test_a_run_goes_on_with_damaged_logs_and_makes_its_held_out_text_again(
    finished: Path, tmp_path: Path, capfd, caplog
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in LOGS:
        lines = (run / name).read_bytes().splitlines()
        (run / name).write_bytes(b"\n".join([lines[0], *BAD_LINES, *lines[1:]]) + b'\n{"torn')
    held_out = (run / "held_out.jsonl").read_bytes()
    for damaged in (b"", held_out[:-20], b"\0" * 99):
        (run / "held_out.jsonl").write_bytes(damaged)
        assert here("evaluate", run) == 2
        error = capfd.readouterr().err
        assert "held_out.jsonl:" in error or "held no documents out" in error
        assert here("pretrain", f"--config={run}") == 0
        assert (run / "held_out.jsonl").read_bytes() == held_out
    assert here("pretrain", f"--config={run}", "--config.train.num_steps=13") == 0
    assert [record["step"] for record in metrics(run)] == list(range(1, 14))
    assert here("inspect", "data", run, "--step=13") == 0
    assert "events.jsonl:2 is damaged, and " in caplog.text
    for line in (run / "events.jsonl").read_bytes().splitlines()[len(BAD_LINES) + 1 :]:
        assert json.loads(line)["event"]


def test_a_line_without_end_takes_little_memory_and_costs_no_other(tmp_path: Path, monkeypatch):
    for module in (train.run.json_lines, train.run.events):
        monkeypatch.setattr(module, "LARGEST_FILE" if module is train.run.json_lines else "LONGEST_TORN", 2**16)
    path = tmp_path / "events.jsonl"
    Events(path).write("start", step=0)
    for ending in (b"\n", b"", b"}"):
        with path.open("ab") as file:
            file.write(b"\0" * 2**23 + ending)
        tracemalloc.start()
        Events(path).write("save", step=8)
        events = [(event["event"], event["step"]) for event in read_events(path)]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert events[-1] == ("save", 8)
        assert events[0] == ("start", 0)
        assert peak < 2**21
    assert len(events) == 4


@pytest.mark.parametrize("field", sorted(HeldOutDocument._fields))
@given(value=BAD_VALUES)
def test_a_held_out_document_with_a_bad_field_is_damaged(tmp_path_factory: pytest.TempPathFactory, field: str, value):
    run = Run(tmp_path_factory.mktemp("run"))
    good = HeldOutDocument("a text", "a prompt", "web")
    run.save_held_out([good, good])
    assert run.held_out_texts() == [good, good]
    # A conversation that is cut may have lost all of its answers.
    assume(value != [] if field == "answers" else field == "cut" or not isinstance(value, str))
    with run.held_out.open("a") as file:
        file.write(json.dumps({"text": "a"} | {field: value}) + "\n")
    with pytest.raises(InputError, match=r"held_out.jsonl:3 is damaged; remove it"):
        run.held_out_texts()


@pytest.mark.parametrize("line", [*BAD_LINES, b'{"action": "skip", "batches": [0]}', b'{"batches": 5}'])
def test_a_ledger_that_is_damaged_is_named(tmp_path: Path, line: bytes):
    good = b'{"action": "skip", "batches": [3]}\n'
    (tmp_path / "recovery.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(InputError, match=r"recovery.jsonl:2 is damaged; restore it"):
        read_ledger(tmp_path / "recovery.jsonl")


def test_checkpoints_or_a_ledger_that_are_gone_do_not_begin_the_run_again(finished: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    (run / "checkpoints").rename(tmp_path / "away")
    for flags in ([], [f"--config.checkpoint.dir={tmp_path / 'empty'}"]):
        assert here("pretrain", f"--config={run}", "--config.train.num_steps=14", *flags) == 2
        assert "has saved its step 12; restore or mount it" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in run.glob("*.json*")} == before
    (tmp_path / "away").rename(run / "checkpoints")
    Events(run / "events.jsonl").write("rollback", step=6, to=4, action="skip")
    assert here("pretrain", f"--config={run}", "--config.train.num_steps=14") == 2
    assert "recovery.jsonl is gone or empty" in capsys.readouterr().err
