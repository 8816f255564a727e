"""`ziggurat plan` as its user meets it."""

import json
import os
import sys
from pathlib import Path

import pytest

from launch.cli import prepare_process
from launch.plan_text import plan_text, seconds_text
from tests.launch.small_run import here, write_config
from tests.peers import require
from train.planning.plan import Plan

KEYS = {
    "fits", "peak_bytes_per_device", "argument_bytes_per_device", "flops_per_device", "collective_bytes_per_device",
    "estimated_step_seconds", "estimated_mfu", "tokens_per_second", "compile_seconds",
}  # fmt: skip
WRONG = [
    (["--topology=v5x:2x2"], "unknown chip 'v5x'"),
    (["--topology=v5e:3x3"], "as in v5e:2x2 or v5e:16x16"),
    (["--topology=h100:1x8", "--slices=2"], "give more hosts"),
    (["--slices=2"], "--slices=2 goes with --topology"),
    (["--topology=v5e:2x2", "--slices=two"], "--slices=two: give a whole number"),
    (["--tokens=many"], "--tokens=many: give a number above 0, as in --tokens=2e12"),
    (["--tokens=nan"], "--tokens=nan: give a number above 0"),
    (["--price=-1"], "--price=-1: give a number above 0"),
    (["--topology=v5e:2x2", "--config.model.layers=2"], "model.layers: there is no such field"),
    (["--topology=v5e:2x2", "--config.train.batch_size=6"], "nearest size that works"),
    (["--topology=v5e:2x2", "--config.mesh.tensor=3"], "does not fit 4 devices"),
]


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A small config whose corpus is not there: nothing reads it."""
    file = write_config(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    return f"--config={file}"


@pytest.mark.parametrize(("flags", "words"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_what_is_wrong_is_said_before_anything_is_compiled(
    flags: list[str], words: str, config: str, monkeypatch, capsys
):
    require("libtpu")
    monkeypatch.setattr("train.planning.compilation.compile_step", None)
    assert here("plan", config, *flags) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert "Traceback" not in err


def test_a_plan_for_a_slice_is_one_json_object_alone_or_a_text_that_says_the_same(config: str, tmp_path: Path, capsys):
    require("libtpu")
    flags = [config, "--topology=v5e:2x2", "--slices=2", "--tokens=1e9", "--price=1.2"]
    assert here("plan", *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["fits"] is True
    assert found["devices"] == 8
    assert found["mesh"]["slice"] == 2
    assert found["cost"] == pytest.approx(found["device_hours"] * 1.2)
    assert {axis for c in found["collectives"] for axis in c["axes"]} == {"slice", "fsdp"}

    assert here("plan", *flags) == 0
    text = capsys.readouterr().out
    assert "on v5e:2x2 × 2 slices: 8 × TPU v5 lite as slice 2 × fsdp 4" in text
    assert f"{found['peak_bytes_per_device'] / 2**20:.2f} MiB of 15.75 GiB a device: fits" in text
    assert f"{found['estimated_mfu']:.1%} MFU" in text
    assert "compiled before, in" in text
    assert not (tmp_path / "run").exists()


def test_a_plan_that_does_not_fit_says_by_how_much_and_what_to_do(config: str, capsys):
    require("libtpu")
    assert here("plan", config, "--topology=v5e:2x2", "--config.train.batch_size=16777216") == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "exceeds available HBM (15.75G)" in text
    assert "train.accumulation_steps" in text


def test_without_a_topology_it_plans_for_this_machine_and_measures(config: str, capsys):
    assert here("plan", config, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert found["devices"] == 8
    assert found["measured_step_seconds"] > 0
    measured = seconds_text(found["measured_step_seconds"])
    assert f"measured here: {measured}; the estimate is off by" in plan_text(Plan(**found), "small")


def test_a_step_that_takes_long_is_not_measured(config: str, monkeypatch, capsys, caplog):
    monkeypatch.setattr("launch.plan.MAX_MEASURED_SECONDS", 0.0)
    assert here("plan", config, "--json") == 0
    assert json.loads(capsys.readouterr().out)["measured_step_seconds"] is None
    assert "too long to be measured" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /dev with these files")
def test_compilers_for_absent_accelerators_are_left_alone_by_other_commands(monkeypatch):
    def platforms(files: tuple[str, ...], own: str | None) -> str | None:
        monkeypatch.setattr("launch.cli.ACCELERATORS", files)
        monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": own} if own else {})
        prepare_process([])
        return os.environ.get("JAX_PLATFORMS")

    assert platforms(("no-such-device*",), None) == "cpu"
    assert os.environ["JAX_ENABLE_X64"] == "0"
    assert platforms(("no-such-device*", "nul[l]"), None) is None
    assert platforms(("no-such-device*",), "tpu,cpu") == "tpu,cpu"
