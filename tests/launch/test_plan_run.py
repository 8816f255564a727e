"""`ziggurat plan RUN` as its user meets it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.launch.small_run import here, metrics
from tests.peers import require
from train.planning.measured_steps import FIRST_STEPS


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run's logs and config, to be changed."""
    for name in ("config.json", "metrics.jsonl", "events.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    return tmp_path


def rewrite_starts(run: Path, **fields: object) -> None:
    """Changes fields of the start events, as if the run had run elsewhere."""
    file = run / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps(event | (fields if event["event"] == "start" else {})) + "\n" for event in events]
    file.write_text("".join(lines))


def test_a_plan_of_a_run_stands_next_to_what_its_steps_measured(moved: Path, capsys):
    assert here("plan", moved, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rates = sorted(record["tokens_per_second"] for record in metrics(moved)[FIRST_STEPS:])
    assert found["run"]["steps"] == len(rates) == 2
    assert found["run"]["mesh"] == {"fsdp": 8}
    assert found["mesh"]["fsdp"] == found["devices"] == 8
    assert found["comparison"]["tokens_per_second"]["measured"] == rates[-1]
    assert found["comparison"]["tokens_per_second"]["planned"] == found["tokens_per_second"]
    for figure in found["comparison"].values():
        assert figure["ratio"] == pytest.approx(figure["planned"] / figure["measured"])
    assert found["comparison"].keys() == {"step_seconds", "tokens_per_second", "mfu", "peak_bytes"}
    assert found["measured_step_seconds"] is None

    assert here("plan", moved) == 0
    text = capsys.readouterr().out
    assert f"{moved} on 8 × cpu, medians of 2 steady steps:" in text
    assert f"{rates[-1]:,.0f}" in text
    assert "peak of a process" in text


def test_a_run_on_chips_is_planned_for_a_topology_that_has_them(moved: Path, capsys):
    require("libtpu")
    rewrite_starts(moved, devices="8 × TPU v5 lite")
    assert here("plan", moved, "--topology=v5e:2x4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device_kind"], found["run"]["device_kind"]) == ("TPU v5 lite", "TPU v5 lite")
    assert found["comparison"]["step_seconds"]["measured"] == found["run"]["step_seconds"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --config=NAME|FILE|RUN, or a RUN"),
        (["{run}", "--config=small"], "one of the two"),
        (["{run}", "--config.model.num_layers=3"], "--config.model.num_layers would plan another step than the run's"),
        (["{run}", "--search", "--topology=v5e:2x2"], "--search would plan other steps than the run's; give it with"),
        (["{run}/none"], "there is no such folder"),
        (["small"], "the preset of this name is --config=small"),
        (["{run}/empty"], "has no config.json"),
        (["{run}/metrics.jsonl"], "has no config.json"),
        (["{run}/short"], "has logged 3 steps, none of which is steady"),
        (["{run}", "--topology=h100:1x8"], "--topology=h100:1x8 is 8 × NVIDIA H100 80GB HBM3, but"),
        (["{run}/pod"], "ran on 16 × TPU v5 lite, but this machine has 8 × cpu; give --topology=v5e:SHAPE with 16"),
        (["{run}/mesh"], "ran as tensor 8, but its config is fsdp 8 here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_said_before_anything_is_compiled(
    flags: list[str], words: str, moved: Path, monkeypatch, capsys
):
    if "--topology=h100:1x8" in flags:
        require("jax_cuda13_plugin")
    logs = [moved / name for name in ("config.json", "metrics.jsonl", "events.jsonl")]
    (moved / "empty").mkdir()
    for name in ("short", "pod", "mesh"):
        (moved / name).mkdir()
        for file in logs:
            shutil.copy(file, moved / name)
    lines = logs[1].read_text().splitlines(keepends=True)
    (moved / "short" / "metrics.jsonl").write_text("".join(lines[:3]))
    rewrite_starts(moved / "pod", devices="16 × TPU v5 lite")
    rewrite_starts(moved / "mesh", mesh={"tensor": 8})
    monkeypatch.setattr("train.planning.compilation.compile_step", None)
    assert here("plan", *(flag.format(run=moved) for flag in flags)) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert out == ""
