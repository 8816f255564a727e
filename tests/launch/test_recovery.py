"""A run that heals itself: an outlier is tried again, then skipped, and the rest is as if it had never been there."""

import contextlib
import io
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import train.loop
from tests.launch.small_run import TRAINING_ALONE, here, metrics, write_config
from tests.launch.test_pretrain import assert_same_end, without_times
from train.run.ledger import MOST_RETRIES

FLAGS = ["--config.train.num_steps=10", *TRAINING_ALONE]


def events(run: Path, name: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def run(folder: Path, name: str, *flags: str) -> Path:
    assert here("pretrain", f"--config={write_config(folder, name)}", *FLAGS, *flags) == 0
    return folder / name


def poison(monkeypatch: pytest.MonkeyPatch, is_bad, times: float = math.inf) -> None:
    """Makes the state and figures of `times` steps NaN, where `is_bad(step, tokens of the batch)`."""
    left = [times]

    class Programs(train.loop.StepPrograms):
        def __call__(self, step, state, batch):
            if left[0] > 0 and is_bad(step, np.asarray(batch["tokens"])):
                left[0] -= 1
                state["weights"] = jax.tree.map(lambda x: x * math.nan, state["weights"])
            return super().__call__(step, state, batch)

    monkeypatch.setattr(train.loop, "StepPrograms", Programs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("straight"), "straight")


# Before the first save, just behind one, and the last step.
@pytest.mark.parametrize("step", [3, 9, 10])
def test_after_an_error_of_a_device_the_same_steps_are_done_again(step, straight, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, lambda at, _: at == step, times=1)
    healed = run(tmp_path, "healed")
    assert_same_end(healed, straight, 10)
    assert without_times(metrics(healed)) == without_times(metrics(straight))
    (rollback,) = events(healed, "rollback")
    back = {3: 0, 9: 8, 10: 8}[step]
    assert (rollback["step"], rollback["to"], rollback["action"]) == (step, back, "retry")
    assert f"step {step}: loss is nan; back to step {back}, to try its rows again" in capfd.readouterr().err
    assert rollback["seconds"]["lost"] > 0
    # The steps up to the save are not lost.
    assert (rollback["seconds"]["steps"] > 0) == (back > 0)


def test_rows_that_stand_out_again_are_left_out_as_in_a_run_that_was_told_to(straight, tmp_path, monkeypatch):
    rows: list[bytes] = []

    def is_bad(step: int, tokens: np.ndarray) -> bool:
        if step == 6 and not rows:
            rows.append(tokens.tobytes())
        return tokens.tobytes() in rows

    poison(monkeypatch, is_bad)
    healed = run(tmp_path, "healed")
    monkeypatch.undo()
    told = run(tmp_path, "told", '--config.recovery.skips={"6": 1}')
    assert_same_end(healed, told, 10)
    assert without_times(metrics(healed)) == without_times(metrics(told))
    assert metrics(healed)[4]["loss"] == metrics(straight)[4]["loss"]
    assert metrics(healed)[5]["loss"] != metrics(straight)[5]["loss"]
    # The next row that it trains on is the one behind the skipped rows.
    assert metrics(healed)[5]["loss"] != metrics(straight)[6]["loss"]
    assert [event["action"] for event in events(healed, "rollback")] == ["retry", "skip"]
    (skip,) = events(healed, "skip")
    assert skip["step"] == 6
    assert [row["row"] for row in skip["rows"]] == list(range(8))
    assert skip["rows"] == events(told, "skip")[0]["rows"]
    # They are the rows that the straight run trained on.
    assert [{"batch": 0} | row for row in described(straight, 6)] == without_text(skip["rows"])
    assert described(healed, 6) == described(straight, 7)
    assert described(healed, 10) != described(straight, 10)


def without_text(rows: list[dict]) -> list[dict]:
    """Nor the names of files, which each test has its own of."""
    for row in rows:
        row["parts"] = [{name: part[name] for name in part if name not in ("text", "file")} for part in row["parts"]]
    return rows


def described(folder: Path, step: int) -> list[dict]:
    """The rows that `inspect data` prints for a step, without their text."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert here("inspect", "data", folder, f"--step={step}", "--json") == 0
    return without_text(json.loads(out.getvalue())["rows"])


def test_any_number_of_steps_may_be_tried_again_if_saves_are_between_them(tmp_path, monkeypatch):
    tried = set()
    poison(monkeypatch, lambda at, _: at not in tried and not tried.add(at))
    flags = [f"--config.train.num_steps={MOST_RETRIES + 2}", "--config.checkpoint.every_steps=1"]
    healed = run(tmp_path, "healed", *flags, "--config.evaluation.every_steps=99")
    assert [event["step"] for event in events(healed, "rollback")] == list(range(1, MOST_RETRIES + 3))


def test_what_cannot_be_healed_ends_with_status_2_and_its_last_good_state(tmp_path, monkeypatch, capfd):
    poison(monkeypatch, lambda at, _: at == 6)
    status = here("pretrain", f"--config={write_config(tmp_path)}", *FLAGS, "--config.recovery.max_skipped_batches=2")
    err = capfd.readouterr().err
    assert status == 2
    assert "step 6: loss is nan; 2 batches have been skipped already, and recovery.max_skipped_batches is 2" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    assert [event["action"] for event in events(tmp_path / "run", "rollback")] == ["retry", "skip"] * 2 + ["retry"]


def test_weights_that_are_no_numbers_are_not_saved(straight, tmp_path, monkeypatch):
    class Programs(train.loop.StepPrograms):
        done = False

        def __call__(self, step, state, batch):
            state, metrics = super().__call__(step, state, batch)
            if step == 8 and not Programs.done:
                Programs.done = True
                # The step's own figures are good.
                state["weights"] = jax.tree.map(lambda x: x * math.nan, state["weights"])
            return state, metrics

    monkeypatch.setattr(train.loop, "StepPrograms", Programs)
    healed = run(tmp_path, "healed")
    assert_same_end(healed, straight, 10)
    (rollback,) = events(healed, "rollback")
    assert (rollback["step"], rollback["to"]) == (8, 4)
    assert "are not finite" in rollback["problem"]


def test_copies_that_differ_between_devices_are_not_saved(tmp_path, monkeypatch, capfd):
    class Programs(train.loop.StepPrograms):
        def __call__(self, step, state, batch):
            state, metrics = super().__call__(step, state, batch)
            if step == 8:
                scale = state["weights"]["norm"]["scale"]
                copies = [shard.data for shard in scale.addressable_shards]
                copies[3] = jax.device_put(np.nextafter(copies[3], 2), copies[3].sharding)
                changed = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, copies)
                state["weights"]["norm"]["scale"] = changed
            return state, metrics

    monkeypatch.setattr(train.loop, "StepPrograms", Programs)
    assert here("pretrain", f"--config={write_config(tmp_path)}", *FLAGS) == 1
    assert "copies of weights.norm.scale differ between devices" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]


def test_where_the_last_rows_of_a_corpus_are_left_out_the_run_ends_before_them(straight, tmp_path, monkeypatch):
    small = tmp_path / "small.jsonl"
    small.write_text("".join((straight.parent / "corpus.jsonl").open().readlines()[:60]))
    flags = ["--config.train.num_steps=1000", "--config.data.epochs=1", "--config.checkpoint.every_steps=1000",
             f"--config.data.corpus={small}", f"--config.tokenizer.path={straight / 'tokenizer'}"]  # fmt: skip
    last = len(metrics(run(tmp_path, "straight", *flags)))
    # A save just before the last step, which is poisoned twice.
    flags[2] = f"--config.checkpoint.every_steps={last - 1}"
    poison(monkeypatch, lambda at, _: at == last, times=2)
    healed = run(tmp_path, "healed", *flags)
    monkeypatch.undo()
    told = run(tmp_path, "told", *flags, f'--config.recovery.skips={{"{last}": 1}}')
    assert [len(metrics(folder)) for folder in (healed, told)] == [last - 1, last - 1]
    assert [path.name for path in (healed / "checkpoints").iterdir()] == [str(last - 1)]
    assert events(healed, "end")[0]["step"] == last - 1
    assert [event["step"] for event in events(healed, "skip")] == [last]


def test_a_spike_is_seen_against_losses_from_before_a_restart(tmp_path, monkeypatch):
    start = ["pretrain", f"--config={write_config(tmp_path)}", *FLAGS, "--config.checkpoint.every_steps=40"]
    assert here(*start, "--config.train.num_steps=40") == 0

    class Programs(train.loop.StepPrograms):
        done = False

        def __call__(self, step, state, batch):
            state, metrics = super().__call__(step, state, batch)
            if step == 42 and not Programs.done:
                Programs.done = True
                metrics = metrics | {"loss": metrics["loss"] + 3}
            return state, metrics

    monkeypatch.setattr(train.loop, "StepPrograms", Programs)
    assert here(*start, "--config.train.num_steps=44") == 0
    (rollback,) = events(tmp_path / "run", "rollback")
    assert (rollback["step"], rollback["to"]) == (42, 40)
    assert "is an outlier: the median of the 41 before is" in rollback["problem"]
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 45))
