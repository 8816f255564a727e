"""The ledger of retried and skipped batches."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import Fault, InputError
from train.config.recovery_config import RecoveryConfig
from train.run.ledger import MOST_RETRIES, Ledger, inherited_entries, read_ledger, write_ledger
from train.step.spike_detector import Anomaly


def test_a_batch_is_retried_once_then_skipped_until_the_budget_is_spent(tmp_path: Path):
    path, config = tmp_path / "recovery.jsonl", RecoveryConfig(max_skipped_batches=2)
    ledger = Ledger(path, config, 0)
    anomaly = Anomaly(7, "loss is nan")
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(Anomaly(9, "loss is nan"), 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("skip", {6: 1})
    # The batch in its place gets its own two chances, and a new start knows all earlier decisions.
    again = Ledger(path, config, 4)
    assert again.skips == {6: 1}
    # Batch 9 has moved up, and has had its second chance.
    assert (again.decide(Anomaly(8, "loss is nan"), 4), again.skipped, again.skips) == ("skip", [7, 9], {6: 1, 7: 1})
    assert again.decide(anomaly, 4) == "retry"
    with pytest.raises(InputError, match="step 7: loss is nan; 2 batches have been skipped already") as caught:
        again.decide(anomaly, 4)
    assert "recovery.max_skipped_batches" in str(caught.value)
    assert [entry["action"] for entry in read_ledger(path)] == ["retry", "retry", "skip", "skip", "retry"]
    # The batches that a fork inherits do not count towards its own budget.
    write_ledger(path, inherited_entries(read_ledger(path)))
    fork = Ledger(path, config, 0)
    assert fork.skipped == [7, 9]
    assert [fork.decide(anomaly, 4) for _ in range(2)] == ["retry", "skip"]


@pytest.mark.parametrize(("checkpoint", "first"), [(0, 3), (2, 3), (4, 5), (6, 7)])
def test_the_skipped_batches_end_with_the_outlier_and_begin_after_the_checkpoint(tmp_path, checkpoint, first):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(skip_batches=5), 0)
    for _ in range(2):
        ledger.decide(Anomaly(7, "loss is inf"), checkpoint)
    assert ledger.skipped == list(range(first, 8))
    assert ledger.skips == {first - 1: 8 - first}


@given(st.lists(st.integers(1, 30), max_size=4), st.integers(1, 5), st.integers(0, 10), st.data())
def test_the_batch_of_the_step_is_skipped_whatever_was_skipped_before(before, window, checkpoint, data):
    config = RecoveryConfig(skip_batches=window, skips=dict.fromkeys(map(str, before), 1))
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "recovery.jsonl", config, 0)
        # The batches that steps read, in their order.
        left = [batch for batch in range(1, 60) if batch not in before]
        assert [ledger.batch_of(step) for step in range(1, 20)] == left[:19]
        outlier = data.draw(st.integers(checkpoint + 1, 19))
        for _ in range(2):
            ledger.decide(Anomaly(outlier, "loss is nan"), checkpoint)
        assert left[outlier - 1] in ledger.skipped
        assert set(ledger.skipped) >= set(before)
        # Nothing that is trained on before the checkpoint changes.
        assert [ledger.batch_of(step) for step in range(1, checkpoint + 1)] == left[:checkpoint]


def test_many_retries_of_different_batches_end_the_start(tmp_path: Path):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(), 0)
    for step in range(1, MOST_RETRIES + 1):
        assert ledger.decide(Anomaly(step, "loss is nan"), 0) == "retry"
    with pytest.raises(Fault, match="10 other steps have been outliers since step 0 was saved"):
        ledger.decide(Anomaly(50, "loss is nan"), 0)
    ledger.mark_saved()
    assert ledger.decide(Anomaly(51, "loss is nan"), 50) == "retry"


@pytest.mark.parametrize(("step", "error"), [(0, InputError), (40, Fault)])
def test_a_first_step_that_fails_with_every_batch_ends_the_start_soon(
    tmp_path: Path, step: int, error: type[Exception]
):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(max_skipped_batches=100), step)
    actions = []
    with pytest.raises(error, match=rf"nan, with each of 3 batches after step {step}, so it is not the data"):
        while len(actions) < 20:
            actions.append(ledger.decide(Anomaly(step + 1, "loss is nan"), step))
    assert actions == ["retry", "skip"] * 2
    # Losses that stand out are of the data, and a save shows that the state is good.
    ledger.mark_saved()
    for i in range(2, 9):
        ledger.decide(Anomaly(step + i, "loss is nan"), step + i - 1)
        ledger.mark_saved()
        for _ in range(2):
            ledger.decide(Anomaly(step + i, "loss 9 is an outlier", is_outlier=True), step + i - 1)


def test_a_trained_batch_cannot_be_skipped_and_a_skipped_one_stays_skipped(tmp_path: Path):
    path = tmp_path / "recovery.jsonl"
    assert Ledger(path, RecoveryConfig(skips={"3": 2}), 0).skips == {2: 2}
    assert Ledger(path, RecoveryConfig(), 0).skips == {2: 2}
    # Four steps have read batches 1, 2, 5 and 6.
    with pytest.raises(InputError, match="batch 6 has been trained on already; the next one is 7"):
        Ledger(path, RecoveryConfig(skips={"6": 1}), 4)
    assert Ledger(path, RecoveryConfig(skips={"7": 1}), 4).skips == {2: 2, 4: 1}
