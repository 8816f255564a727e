"""Outliers, and the ledger of retried and skipped batches."""

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import Fault, InputError
from train.config.recovery_config import RecoveryConfig
from train.run.ledger import MOST_RETRIES, Ledger, inherited_entries, read_ledger, write_ledger
from train.step.spike_detector import LEAST_LOSSES, Anomaly, SpikeDetector


def record(loss: float, step: int = 100, grad_norm: float = 1.0, tokens: float = 256.0) -> dict:
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "loss_weight": tokens}


def of(losses: list[float]) -> list[tuple[float, float]]:
    return [(loss, 256.0) for loss in losses]


def falling(count: int) -> list[float]:
    """Losses that fall, with a deviation of about 0.05 around their path."""
    return [3.0 - 0.001 * i + 0.05 * math.sin(7 * i) for i in range(count)]


@pytest.mark.parametrize("figures", [record(math.nan), record(math.inf), record(2.0, grad_norm=math.nan)], ids=str)
def test_what_is_no_number_stands_out_at_once(figures):
    with pytest.raises(Anomaly, match="loss is|grad_norm is") as caught:
        SpikeDetector(RecoveryConfig()).check(figures)
    assert caught.value.step == 100


def test_a_spike_stands_out_and_noise_a_fall_and_few_losses_do_not():
    judge = SpikeDetector(RecoveryConfig())
    for loss in falling(500):
        judge.check(record(loss))
    assert list(judge.history) == of(falling(500)[-128:])
    judge.check(record(2.0))
    with pytest.raises(Anomaly, match=r"loss 3\.4\d* is an outlier: the median of the 128 before is 2\.5"):
        judge.check(record(3.4))
    # What stands out is no part of what is usual.
    assert 3.4 not in [loss for loss, _ in judge.history]
    judge.check(record(2.7))
    few = SpikeDetector(RecoveryConfig(), of(falling(LEAST_LOSSES - 1)))
    few.check(record(9.0))
    off = SpikeDetector(RecoveryConfig(spike_deviations=0.0), of(falling(200)))
    off.check(record(9.0))
    with pytest.raises(Anomaly):
        off.check(record(math.nan))


def test_losses_that_hardly_vary_may_rise_a_little():
    judge = SpikeDetector(RecoveryConfig(), of([0.01] * 100))
    judge.check(record(0.1))
    with pytest.raises(Anomaly):
        judge.check(record(0.12))


def test_other_data_has_other_losses():
    judge = SpikeDetector(RecoveryConfig(), of(falling(200)))
    judge.check(record(9.0), new_data=True)
    assert list(judge.history) == of([9.0])


def test_what_one_process_alone_sees_counts_for_all():
    with pytest.raises(Anomaly, match="grad_norm is nan"):
        SpikeDetector(RecoveryConfig()).check(record(2.0), reports=[(2.0, 1.0), (2.0, math.nan)])


def test_the_last_batches_of_a_corpus_are_of_few_tokens_and_say_little():
    judge = SpikeDetector(RecoveryConfig(), of(falling(200)))
    judge.check(record(9.0, tokens=100.0))
    assert list(judge.history) == of(falling(200)[-128:])
    with pytest.raises(Anomaly):
        judge.check(record(9.0, tokens=200.0))
    with pytest.raises(Anomaly):
        judge.check(record(math.nan, tokens=1.0))


def test_a_batch_is_tried_again_once_then_left_out_until_the_budget_is_spent(tmp_path: Path):
    path, config = tmp_path / "recovery.jsonl", RecoveryConfig(max_skipped_batches=2)
    ledger = Ledger(path, config, 0)
    anomaly = Anomaly(7, "loss is nan")
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(Anomaly(9, "loss is nan"), 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("skip", {6: 1})
    # What comes in its place gets its own two chances, and a new start knows all that was decided.
    again = Ledger(path, config, 4)
    assert again.skips == {6: 1}
    # Batch 9 has moved up, and has had its second chance.
    assert (again.decide(Anomaly(8, "loss is nan"), 4), again.skipped, again.skips) == ("skip", [7, 9], {6: 1, 7: 1})
    assert again.decide(anomaly, 4) == "retry"
    with pytest.raises(InputError, match="step 7: loss is nan; 2 batches have been skipped already") as caught:
        again.decide(anomaly, 4)
    assert "recovery.max_skipped_batches" in str(caught.value)
    assert [entry["action"] for entry in read_ledger(path)] == ["retry", "retry", "skip", "skip", "retry"]
    # What a fork takes over of it is no burden on its own budget.
    write_ledger(path, inherited_entries(read_ledger(path)))
    fork = Ledger(path, config, 0)
    assert fork.skipped == [7, 9]
    assert [fork.decide(anomaly, 4) for _ in range(2)] == ["retry", "skip"]


@pytest.mark.parametrize(("checkpoint", "first"), [(0, 3), (2, 3), (4, 5), (6, 7)])
def test_a_window_ends_with_what_was_found_unless_a_checkpoint_has_been_trained_on_it(tmp_path, checkpoint, first):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(skip_batches=5), 0)
    for _ in range(2):
        ledger.decide(Anomaly(7, "loss is inf"), checkpoint)
    assert ledger.skipped == list(range(first, 8))
    assert ledger.skips == {first - 1: 8 - first}


@given(st.lists(st.integers(1, 30), max_size=4), st.integers(1, 5), st.integers(0, 10), st.data())
def test_whatever_has_been_left_out_before_the_batch_of_the_step_is_left_out(before, window, checkpoint, data):
    config = RecoveryConfig(skip_batches=window, skips=dict.fromkeys(map(str, before), 1))
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "recovery.jsonl", config, 0)
        # What steps read, one after the other.
        left = [batch for batch in range(1, 60) if batch not in before]
        assert [ledger.batch_of(step) for step in range(1, 20)] == left[:19]
        found = data.draw(st.integers(checkpoint + 1, 19))
        for _ in range(2):
            ledger.decide(Anomaly(found, "loss is nan"), checkpoint)
        assert left[found - 1] in ledger.skipped
        assert set(ledger.skipped) >= set(before)
        # Nothing that is trained on before the checkpoint changes.
        assert [ledger.batch_of(step) for step in range(1, checkpoint + 1)] == left[:checkpoint]


def test_a_device_that_fails_anew_each_time_ends_the_start(tmp_path: Path):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(), 0)
    for step in range(1, MOST_RETRIES + 1):
        assert ledger.decide(Anomaly(step, "loss is nan"), 0) == "retry"
    with pytest.raises(Fault, match="10 other steps have been outliers since step 0 was saved"):
        ledger.decide(Anomaly(50, "loss is nan"), 0)
    ledger.mark_saved()
    assert ledger.decide(Anomaly(51, "loss is nan"), 50) == "retry"


def test_what_has_been_trained_on_cannot_be_left_out_and_what_was_left_out_stays_so(tmp_path: Path):
    path = tmp_path / "recovery.jsonl"
    assert Ledger(path, RecoveryConfig(skips={"3": 2}), 0).skips == {2: 2}
    assert Ledger(path, RecoveryConfig(), 0).skips == {2: 2}
    # Four steps have read batches 1, 2, 5 and 6.
    with pytest.raises(InputError, match="batch 6 has been trained on already; the next one is 7"):
        Ledger(path, RecoveryConfig(skips={"6": 1}), 4)
    assert Ledger(path, RecoveryConfig(skips={"7": 1}), 4).skips == {2: 2, 4: 1}
