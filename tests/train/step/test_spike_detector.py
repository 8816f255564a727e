"""Outliers of the loss, and values that are not finite."""

import math
import statistics

import pytest

from train.config.recovery_config import RecoveryConfig
from train.step.spike_detector import LEAST_LOSSES, Anomaly, SpikeDetector


def record(loss: float, step: int = 100, grad_norm: float = 1.0, tokens: float = 256.0) -> dict:
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "loss_weight": tokens}


def of(losses: list[float]) -> list[tuple[float, float]]:
    return [(loss, 256.0) for loss in losses]


def falling(count: int) -> list[float]:
    """Losses that fall, with a deviation of about 0.05 around their path."""
    return [3.0 - 0.001 * i + 0.05 * math.sin(7 * i) for i in range(count)]


@pytest.mark.parametrize("figures", [record(math.nan), record(math.inf), record(2.0, grad_norm=math.nan)], ids=str)
def test_a_value_that_is_not_finite_is_an_anomaly_at_once(figures):
    with pytest.raises(Anomaly, match="loss is|grad_norm is") as caught:
        SpikeDetector(RecoveryConfig()).check(figures)
    assert caught.value.step == 100


def test_a_spike_is_an_outlier_but_noise_a_fall_and_few_losses_are_not():
    detector = SpikeDetector(RecoveryConfig())
    for loss in falling(500):
        detector.check(record(loss))
    assert list(detector.history) == of(falling(500)[-128:])
    detector.check(record(2.0))
    with pytest.raises(Anomaly, match=r"loss 3\.4\d* is an outlier: the median of the 128 before is 2\.5"):
        detector.check(record(3.4))
    # An outlier does not enter the history.
    assert 3.4 not in [loss for loss, _ in detector.history]
    detector.check(record(2.7))
    few = SpikeDetector(RecoveryConfig(), of(falling(LEAST_LOSSES - 1)))
    few.check(record(9.0))
    off = SpikeDetector(RecoveryConfig(spike_deviations=0.0), of(falling(200)))
    off.check(record(9.0))
    with pytest.raises(Anomaly):
        off.check(record(math.nan))


def test_steps_without_a_trained_token_are_no_losses():
    detector = SpikeDetector(RecoveryConfig(), [*[(0.0, 0.0)] * 20, *of([6.8] * 2)])
    for _ in range(40):
        detector.check(record(0.0, tokens=0.0))
    assert list(detector.history) == of([6.8] * 2)
    detector.check(record(6.9))


@pytest.mark.parametrize("deviations", [5.0, 10.0])
def test_deviations_are_those_of_a_normal_distribution(deviations: float):
    normal = statistics.NormalDist(3.0, 0.1)
    losses = of([normal.inv_cdf((i + 0.5) / 128) for i in range(128)])
    config = RecoveryConfig(spike_deviations=deviations)
    SpikeDetector(config, losses).check(record(3.0 + 0.95 * deviations * 0.1))
    with pytest.raises(Anomaly):
        SpikeDetector(config, losses).check(record(3.0 + 1.05 * deviations * 0.1))


def test_losses_that_hardly_vary_may_rise_a_little():
    detector = SpikeDetector(RecoveryConfig(), of([0.01] * 100))
    detector.check(record(0.1))
    with pytest.raises(Anomaly):
        detector.check(record(0.12))


def test_other_data_has_other_losses():
    detector = SpikeDetector(RecoveryConfig(), of(falling(200)))
    detector.check(record(9.0), new_data=True)
    assert list(detector.history) == of([9.0])


def test_a_value_that_is_not_finite_on_one_process_counts_for_all():
    with pytest.raises(Anomaly, match="grad_norm is nan"):
        SpikeDetector(RecoveryConfig()).check(record(2.0), reports=[(2.0, 1.0), (2.0, math.nan)])


def test_a_batch_with_few_tokens_is_no_outlier_unless_it_is_not_finite():
    detector = SpikeDetector(RecoveryConfig(), of(falling(200)))
    detector.check(record(9.0, tokens=100.0))
    assert list(detector.history) == of(falling(200)[-128:])
    with pytest.raises(Anomaly):
        detector.check(record(9.0, tokens=200.0))
    with pytest.raises(Anomaly):
        detector.check(record(math.nan, tokens=1.0))
