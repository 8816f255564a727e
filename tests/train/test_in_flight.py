"""Steps in flight: what the host makes of a finished step's figures."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.config import stages
from data.mixture import Mixture, Source
from train.config.reading import make_config
from train.config.recovery_config import RecoveryConfig
from train.in_flight import InFlight
from train.step.spike_detector import LEAST_LOSSES, Anomaly, SpikeDetector

CHANGE = 40


class OneProcess:
    """An `Agreement` without devices."""

    def send(self, report: list[float], figures: list[Any]) -> list[float]:
        return [*report, *figures]

    def read(self, sent: list[float]) -> np.ndarray:
        return np.array([sent])


class ThreeProcesses(OneProcess):
    """The second is the slowest, and the third waits for data and was asked to stop."""

    def read(self, sent: list[float]) -> np.ndarray:
        return np.array([[*report, *sent[3:]] for report in ([0, 3, 4], [0, 1, 7], [1, 5, 6])])


def in_flight(weight_of_b: Any = 1, agreement: Any = None) -> InFlight:
    config = make_config({"train": {"batch_size": 8, "num_steps": 100}}).resolved()
    unread: Any = None
    weights = {"a": 1, "b": weight_of_b}
    sources = [Source(name, unread, config.data, tuple(stages(weight))) for name, weight in weights.items()]
    inputs: Any = SimpleNamespace(config=config, mixture=Mixture(sources))
    detector = SpikeDetector(RecoveryConfig())
    return InFlight(inputs, agreement or OneProcess(), detector, 0, 100, 1.0)


def finish(steps: InFlight, step: int, loss: float) -> dict[str, Any]:
    steps.add(step, {"loss": np.float32(loss), "grad_norm": np.float32(1), "loss_weight": np.float32(4096)}, [0, 0, 0])
    return steps.finish_oldest()[0]


def test_a_rise_of_the_loss_is_a_spike_unless_the_mixture_has_changed_at_this_step():
    # Weights are by the number of steps done before: step 41 is the first after 40.
    for weight, jump, is_spike in (
        (1, CHANGE + 1, True),
        ([[0, 1], [CHANGE, 3]], CHANGE + 1, False),
        ([[0, 1], [CHANGE - 1, 3]], CHANGE + 1, False),
        ([[0, 1], [CHANGE, 3]], CHANGE, True),
    ):
        steps = in_flight(weight)
        assert jump > LEAST_LOSSES
        for step in range(1, jump):
            assert finish(steps, step, 3 + 0.01 * (step % 5))["step"] == step
        if is_spike:
            with pytest.raises(Anomaly, match=f"step {jump}: loss 6"):
                finish(steps, jump, 6.0)
        else:
            assert finish(steps, jump, 6.0)["loss"] == 6.0


def test_figures_of_all_processes_are_joined():
    steps = in_flight(agreement=ThreeProcesses())
    steps.add(1, {"loss": np.float32(3), "grad_norm": np.float32(1), "loss_weight": np.float32(4096)}, [0, 0, 0])
    record, asked = steps.finish_oldest()
    assert asked
    assert record["data_wait_seconds"] == 5.0
    assert (record["slowest_process"], record["slowest_process_seconds"]) == (1, 7.0)
    assert record["slowest_process_data_wait_seconds"] == 1.0
