"""A run may move between meshes and numbers of processes: the same rows, bits and loss curve (C1, C5, C6)."""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import train.loop
from tests.benchmarks.meshes import BOUNDS
from tests.launch.small_run import back_to, here, metrics, write_config, ziggurat
from train.checkpoint.checkpoint import Checkpoints
from train.config.run_config import MeshConfig
from train.devices.mesh import make_mesh
from train.run.folder import Run
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state

FLAGS = ["--config.data.positions_every_steps=1", "--config.evaluation.sample_tokens=0"]


def state_of(run: Path, devices: int):
    """The newest checkpoint, restored on the first devices of this process, and its progress."""
    config = dataclasses.replace(Run(run).load_config(), mesh=MeshConfig())
    with jax.set_mesh(make_mesh(config, jax.devices()[:devices])):
        checkpoints = Checkpoints(run / "checkpoints")
        found = checkpoints.restore(abstract_state(config, make_optimizer(config)))
        checkpoints.close()
        assert found is not None
        return jax.device_get(found)


def positions(run: Path) -> dict[int, list]:
    """The fingerprint of the data and the position of each stream, by step."""
    records = map(json.loads, (run / "positions.jsonl").read_text().splitlines())
    return {record["step"]: [record["data"], record["positions"]] for record in records}


def assert_same_curve(run: Path, expected: Path, first: int = 1) -> None:
    found, wanted = ({record["step"]: record for record in metrics(folder)} for folder in (run, expected))
    assert list(found) == list(wanted) == list(range(1, 13))
    assert positions(run) == positions(expected)
    worst = dict.fromkeys(BOUNDS["processes"], 0.0)
    for step in range(first, 13):
        assert found[step]["loss_weight"] == wanted[step]["loss_weight"]
        for name in worst:
            worst[name] = max(worst[name], abs(found[step][name] / wanted[step][name] - 1))
    print(f"{run.name}: {worst}")
    for name, bound in BOUNDS["processes"].items():
        assert worst[name] <= bound, name
    assert found[12]["validation_loss"] == pytest.approx(wanted[12]["validation_loss"], rel=BOUNDS["processes"]["loss"])


def test_a_run_on_several_processes_and_moved_between_meshes_is_the_run_on_one_device(tmp_path: Path, monkeypatch):
    config, one, two = write_config(tmp_path, "one"), tmp_path / "one", tmp_path / "two"

    def on_devices(number: int, run: Path, *flags: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(train.loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:number]))
            assert here("pretrain", f"--config={config}", f"--config.train.run_dir={run}", *FLAGS, *flags) == 0
        return run

    def on_processes(number: int, devices: int, run: Path, *flags: str) -> Path:
        done = ziggurat("launch", "local", f"--processes={number}", f"--devices={devices}", "--", "pretrain",
                        f"--config={config}", f"--config.train.run_dir={run}", *FLAGS, *flags)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "[0] " in done.stderr
        return run

    on_devices(1, one)
    # Every row's positions are shared by the devices of both processes.
    assert_same_curve(on_processes(2, 2, two, "--config.mesh.context=4"), one)
    assert {record.get("slowest_process") for record in metrics(two)} <= {0, 1}
    # It resumes at step 8 on more processes: two have a slice, and share its heads and its vocabulary.
    shared = ["--config.mesh.slices=2", "--config.mesh.tensor=2", "--config.evaluation.sample_tokens=3"]
    four = on_processes(4, 1, back_to(8, two, tmp_path / "four"), *shared)
    assert_same_curve(four, one, first=9)
    # Its sample is what one process generates.
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert here("generate", four, "--prompt=def ", "--max_new_tokens=3") == 0
    assert text.getvalue() == metrics(four)[11]["sample"]

    # What they saved comes back on one process, on any mesh: the bits that process 0 exported.
    expected, wanted = state_of(one, 1)
    for run in (two, four):
        (state, progress), (whole, _) = state_of(run, 8), state_of(run, 1)
        for array, other, near in zip(*map(jax.tree.leaves, (state, whole, expected)), strict=True):
            np.testing.assert_array_equal(array, other)
            np.testing.assert_allclose(array, near, atol=2e-3)
        exported, weights = load_file(run / "export" / "model.safetensors"), state["weights"]
        np.testing.assert_array_equal(exported["model.norm.weight"], weights["norm"]["scale"])
        table = exported["model.embed_tokens.weight"]
        np.testing.assert_array_equal(table, weights["embedding"]["table"][: len(table)])
        assert progress["positions"] == wanted["positions"]
        assert progress["identity"] == wanted["identity"]

    # And it resumes there: in shards, and on the mesh that it had over two processes, with the same sums.
    assert_same_curve(on_devices(8, back_to(8, two, tmp_path / "shards")), one, first=9)
    same = on_devices(4, back_to(8, two, tmp_path / "same"), "--config.mesh.context=4")
    # The loss is a float32, whose last digit is as far as it may go: processes and devices sum in different orders.
    assert metrics(same)[8]["loss"] == pytest.approx(metrics(two)[8]["loss"], rel=float(np.finfo(np.float32).eps))


def test_a_mixture_of_corpora_and_experts_on_two_processes_is_that_on_eight_devices_and_resumes(tmp_path: Path):
    fields = {
        "num_experts": 4,
        "expert_dim": 32,
        "balance_bias": "true",
        "balance_rate": 0.01,
        "router_score": "sigmoid",
    }
    config, one, two = write_config(tmp_path, "one"), tmp_path / "one", tmp_path / "two"
    text = (tmp_path / "corpus.jsonl").read_bytes().replace(b"cat", b"cow")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    corpora = {
        "a": {"corpus": str(tmp_path / "corpus.jsonl"), "weight": 3},
        "b": {"corpus": str(tmp_path / "b.jsonl.gz")},
    }
    flags = [*FLAGS, f"--config.data.corpus={json.dumps(corpora)}",
             *(f"--config.model.{name}={value}" for name, value in fields.items())]  # fmt: skip
    assert here("pretrain", f"--config={config}", "--config.mesh.fsdp=2", "--config.mesh.expert=4", *flags) == 0
    done = ziggurat("launch", "local", "--processes=2", "--devices=2", "--", "pretrain", f"--config={config}",
                    f"--config.train.run_dir={two}", "--config.mesh.fsdp=2", "--config.mesh.expert=2",
                    *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_curve(two, one)
    for record, other in zip(metrics(one), metrics(two), strict=True):
        assert record["expert_load_most"] == other["expert_load_most"] > 1

    again = back_to(8, one, tmp_path / "again")
    assert here("pretrain", f"--config={again}") == 0
    straight, resumed = (state_of(run, 1)[0]["weights"]["blocks"]["experts"]["balance"] for run in (one, again))
    assert np.abs(straight).max() > 0.01
    for array, other in zip(*(jax.tree.leaves(state_of(run, 1)[0]) for run in (one, again)), strict=True):
        np.testing.assert_array_equal(array, other)
    np.testing.assert_array_equal(straight, resumed)
