"""Forks: a run that begins with another's checkpoint, and does exactly what the settings say (C1, C4)."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.presets import load_config
from tests.launch.small_run import CONFIG, back_to, here, metrics, write_config, write_corpus
from tests.launch.test_pretrain import assert_same_end, state_of, without_times
from train.config.reading import make_config
from train.run.folder import Run
from train.run.ledger import write_ledger

KEPT = ["--config.checkpoint.export=false", "--config.checkpoint.keep=9", "--config.evaluation.sample_tokens=0"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with a stable rate and a decay at its end, and checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("parent")
    assert here("pretrain", f"--config={write_config(folder)}", *KEPT, "--config.optimizer.schedule=wsd") == 0
    return folder / "run"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def event(run: Path) -> dict:
    """The newest start."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "start"][-1]


def test_a_fork_with_all_is_the_parents_own_continuation_and_leaves_the_parent_alone(parent: Path, tmp_path: Path):
    before, fork = contents(parent), tmp_path / "fork"
    assert here("pretrain", f"--config={parent}@8", f"--config.train.run_dir={fork}") == 0
    assert_same_end(fork, parent, 12)
    assert without_times(metrics(fork)) == without_times(metrics(parent))[8:]
    assert Run(fork).held_out_texts() == Run(parent).held_out_texts()
    assert event(fork)["fork"] == {"run": str(parent.resolve()), "step": 8, "with": "all"}
    assert contents(parent) == before

    # From then on it is a run like any other: it resumes from its own checkpoint, without its parent.
    again = tmp_path / "again"
    shutil.copytree(fork, again)
    config = json.loads((again / "config.json").read_text())
    config["train"]["init_from"] = f"{tmp_path / 'gone'}@8"
    (again / "config.json").write_text(json.dumps(config))
    assert here("pretrain", f"--config={again}", "--config.train.num_steps=13") == 0
    assert metrics(again)[-1]["step"] == 13
    assert "fork" not in event(again)


def test_a_fork_does_not_write_to_its_parents_checkpoints(tmp_path: Path):
    """They may be in a place of their own, which a later start of the parent keeps."""
    run = Run(tmp_path / "parent")
    config = make_config({"checkpoint": {"dir": str(tmp_path / "checkpoints")}, "train": {"run_dir": str(run.folder)}})
    run.save_config(config)
    assert load_config(str(run.folder), {}).checkpoint.dir == str(tmp_path / "checkpoints")
    fork = load_config(f"{run.folder}@8", {"train.run_dir": str(tmp_path / "fork")})
    assert fork.train.init_from == f"{run.folder}@8"
    assert Run.from_config(fork).checkpoints == Run(tmp_path / "fork").checkpoints


def test_a_fork_leaves_out_what_its_parent_has_left_out(parent: Path, tmp_path: Path):
    shutil.copytree(parent, tmp_path / "parent")
    write_ledger(tmp_path / "parent" / "recovery.jsonl", [{"action": "skip", "batches": [10]}])
    fork = tmp_path / "fork"
    flags = [f"--config.train.run_dir={fork}", "--config.train.num_steps=10"]
    assert here("pretrain", f"--config={tmp_path / 'parent'}@8", *flags) == 0
    events = [json.loads(line) for line in (fork / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "skip"] == [10]


def test_a_decay_branch_is_one_command_and_reads_on_where_its_parent_was(parent: Path, tmp_path: Path, capsys, caplog):
    branch = tmp_path / "branch"
    assert here("pretrain", f"--config={parent}@4", f"--config.train.run_dir={branch}", "--config.train.num_steps=8",
                "--config.optimizer.decay_fraction=0.5", "--config.optimizer.final_fraction=0") == 0  # fmt: skip
    rates = [record["learning_rate"] for record in metrics(branch)]
    np.testing.assert_allclose(rates, 1e-2 * np.array([0.75, 0.5, 0.25, 0]), atol=1e-9)
    # Its table lists what differs, and its first step has the parent's batch and weights.
    assert "optimizer.decay_fraction  0.2     0.5\n" in caplog.text
    assert metrics(branch)[0]["loss"] == metrics(parent)[4]["loss"]
    capsys.readouterr()
    rows = []
    for run in (branch, parent):
        assert here("inspect", "data", run, "--step=7", "--json") == 0
        rows.append(json.loads(capsys.readouterr().out)["rows"])
    assert rows[0] == rows[1]


def test_a_fork_with_the_optimizer_reads_other_data_from_its_beginning(parent: Path, tmp_path: Path, capsys):
    text = write_corpus(tmp_path / "other.jsonl").read_text().replace("cat", "act")
    (tmp_path / "other.jsonl").write_text(text)
    fork = tmp_path / "fork"
    flags = ["pretrain", f"--config={parent}@8", f"--config.train.run_dir={fork}", "--config.train.num_steps=10",
             f"--config.data.corpus={tmp_path / 'other.jsonl'}"]  # fmt: skip
    assert here(*flags) == 2
    error = capsys.readouterr().err
    assert f"the data is not what the run in {parent} has been trained on" in error
    assert "train.init_with=optimizer" in error
    assert here(*flags, "--config.train.init_with=optimizer") == 0
    assert [record["step"] for record in metrics(fork)] == [9, 10]
    first = json.loads((fork / "positions.jsonl").read_text().splitlines()[0])
    assert first["step"] == 8
    assert not np.array(first["positions"]).any()
    assert "act" in "".join(text.text for text in Run(fork).held_out_texts())
    assert state_of(fork, 10)[0]["optimizer"]["adam"].count == 10
    capsys.readouterr()
    assert here("inspect", "data", fork, "--step=8") == 2
    assert "begins after step 8" in capsys.readouterr().err
    assert here("inspect", "data", fork, "--step=9") == 0


def test_a_fork_with_weights_alone_begins_at_step_0_with_its_parents_tokenizer(parent: Path, tmp_path: Path, capsys):
    write_corpus(tmp_path / "corpus.jsonl")
    config, fork = write_config(tmp_path, "fork"), tmp_path / "fork"
    assert here("pretrain", f"--config={config}", f"--config.train.init_from={parent}@8", *KEPT,
                "--config.train.init_with=weights", "--config.train.num_steps=1", "--config.train.seed=7",
                "--config.optimizer.name=lion", "--config.train.ema_decay=0.5",
                "--config.optimizer.learning_rate=0") == 0  # fmt: skip
    assert [record["step"] for record in metrics(fork)] == [1]
    model = "tokenizer/tokenizer.model"
    assert (fork / model).read_bytes() == (parent / model).read_bytes()
    state, theirs = state_of(fork, 1)[0], state_of(back_to(8, parent, tmp_path / "earlier"), 8)[0]
    jax.tree.map(np.testing.assert_array_equal, state["weights"], theirs["weights"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state["average"], theirs["weights"])
    assert event(fork)["fork"]["with"] == "weights"


def test_what_cannot_be_taken_over_is_refused_at_once_and_nothing_is_made(parent: Path, tmp_path: Path, capsys):
    fork, weights = tmp_path / "fork", tmp_path / "weights"
    assert here("export", parent, "--format=hf", f"--to={weights}") == 0
    start = ["pretrain", f"--config={parent}@8", f"--config.train.run_dir={fork}"]
    several = ["--config.model.num_layers=3", "--config.optimizer.name=lion", "--config.data.segmentation=pack"]
    for flags, *words in (
        ([*start, *several], "  model.num_layers   2            3\n  optimizer.name     adamw        lion\n"
         "  data.segmentation  concatenate  pack\n  give the values from before\n"),
        ([*start, *several, "--config.train.init_with=weights"], "  model.num_layers  2       3\n"),
        ([*start, several[1]], "lion\n  give the values from before, or train.init_with=weights\n"),
        ([*start, several[2]], "pack\n  give the values from before, or train.init_with=optimizer\n"),
        ([*start, "--config.train.num_steps=8"], "has done the 8 steps of"),
        ([*start, f"--config.checkpoint.dir={parent / 'checkpoints'}"], "but no config.json"),
        (["pretrain", f"--config={parent}@8"], "is the run that train.init_from", "--config.train.run_dir=FOLDER"),
        (["pretrain", f"--config={parent}@7", start[2]], "it has no checkpoint of step 7, only [4, 8, 12]"),
        ([*start, f"--config.train.init_from={parent}"],
         f"names no checkpoint, as RUN@STEP does; the newest is {parent}@12"),
        ([*start, f"--config.train.init_from={parent}@last"], "after @ comes the step of a checkpoint"),
        ([*start, "--config.train.init_from="], "train.init_from is empty"),
        ([*start, f"--config.train.init_from={tmp_path / 'none'}@3"], "there is no such folder"),
        ([*start, f"--config.train.init_from={weights}@3"], "is not the config of a run"),
        (["pretrain", f"--config={parent}", "--config.train.init_with=weights"], "no effect without train.init_from"),
        ([*start, "--config.train.init_with=half"], "it must be one of all, optimizer, weights"),
    ):  # fmt: skip
        assert here(*flags) == 2, flags
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert not fork.exists()


def test_a_fork_of_the_default_corpus_takes_its_parents_snapshot(tmp_path: Path, capsys):
    """Python's library may have changed since; the fork reads what its parent read."""
    (tmp_path / "run.py").write_text(
        CONFIG.replace("CORPUS", repr("stdlib")).replace("RUN_DIR", repr(str(tmp_path / "run")))
    )
    snapshot = Run(tmp_path / "run").snapshot
    snapshot.parent.mkdir(parents=True)
    write_corpus(snapshot)
    assert here("pretrain", f"--config={tmp_path / 'run.py'}", "--config.train.num_steps=2", *KEPT) == 0
    fork = tmp_path / "fork"
    assert here("pretrain", f"--config={tmp_path / 'run'}@2", f"--config.train.run_dir={fork}",
                "--config.train.num_steps=3") == 0  # fmt: skip
    assert Run(fork).snapshot.read_bytes() == snapshot.read_bytes()
