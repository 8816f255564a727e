"""What stands out, and what the ledger makes of it."""

import math
from pathlib import Path

import pytest

from data.errors import InputError
from train.recovery import LEAST_LOSSES, Anomaly, Judge, Ledger, read_ledger
from train.recovery_config import RecoveryConfig


def record(loss: float, step: int = 100, grad_norm: float = 1.0) -> dict:
    return {"step": step, "loss": loss, "grad_norm": grad_norm}


def falling(count: int) -> list[float]:
    """Losses that fall, with a deviation of about 0.05 around their path."""
    return [3.0 - 0.001 * i + 0.05 * math.sin(7 * i) for i in range(count)]


@pytest.mark.parametrize("figures", [record(math.nan), record(math.inf), record(2.0, grad_norm=math.nan)], ids=str)
def test_what_is_no_number_stands_out_at_once(figures):
    with pytest.raises(Anomaly, match="loss is|grad_norm is") as caught:
        Judge(RecoveryConfig()).check(figures)
    assert caught.value.step == 100


def test_a_spike_stands_out_and_noise_a_fall_and_few_losses_do_not():
    judge = Judge(RecoveryConfig())
    for loss in falling(500):
        judge.check(record(loss))
    assert list(judge.losses) == falling(500)[-128:]
    judge.check(record(2.0))
    with pytest.raises(Anomaly, match=r"loss 3\.4\d* stands out: the median of the 128 before is 2\.5"):
        judge.check(record(3.4))
    # What stands out is no part of what is usual.
    assert 3.4 not in judge.losses
    judge.check(record(2.7))
    few = Judge(RecoveryConfig(), falling(LEAST_LOSSES - 1))
    few.check(record(9.0))
    off = Judge(RecoveryConfig(spike_deviations=0.0), falling(200))
    off.check(record(9.0))
    with pytest.raises(Anomaly):
        off.check(record(math.nan))


def test_losses_that_hardly_vary_may_rise_a_little():
    judge = Judge(RecoveryConfig(), [0.01] * 100)
    judge.check(record(0.1))
    with pytest.raises(Anomaly):
        judge.check(record(0.12))


def test_other_data_has_other_losses():
    judge = Judge(RecoveryConfig(), falling(200))
    judge.check(record(9.0), anew=True)
    assert list(judge.losses) == [9.0]


def test_a_step_is_tried_again_once_then_its_rows_are_left_out_until_the_budget_is_spent(tmp_path: Path):
    path, config = tmp_path / "recovery.jsonl", RecoveryConfig(max_skipped_batches=2)
    ledger = Ledger(path, config)
    anomaly = Anomaly(7, "loss is nan")
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(Anomaly(9, "loss is nan"), 4), ledger.skips) == ("retry", {})
    assert (ledger.decide(anomaly, 4), ledger.skips) == ("skip", {6: 1})
    # What comes in their place gets its own two chances, and a new start knows all that was decided.
    assert Ledger(path, config).skips == {6: 1}
    again = Ledger(path, config)
    assert again.decide(anomaly, 4) == "retry"
    assert (again.decide(anomaly, 4), again.skips) == ("skip", {6: 2})
    assert again.decide(anomaly, 4) == "retry"
    with pytest.raises(InputError, match="step 7: loss is nan; 2 batches have been left out already") as caught:
        again.decide(anomaly, 4)
    assert "recovery.max_skipped_batches" in str(caught.value)
    assert [entry["action"] for entry in read_ledger(path)] == ["retry", "retry", "skip", "retry", "skip", "retry"]


@pytest.mark.parametrize(("checkpoint", "first"), [(0, 3), (2, 3), (4, 5), (6, 7)])
def test_a_window_ends_with_what_was_found_unless_a_checkpoint_has_been_trained_on_it(tmp_path, checkpoint, first):
    ledger = Ledger(tmp_path / "recovery.jsonl", RecoveryConfig(skip_batches=5, skips={"1": 2, "3": 1}))
    assert ledger.skips == {0: 2, 2: 1}
    for _ in range(2):
        ledger.decide(Anomaly(7, "loss is inf"), checkpoint)
    assert ledger.skips == {0: 2, 2: 1} | {first - 1: 5 + (first == 3)}
