"""An average of checkpoints is the sum that its weights say, and for a decay what the decay would have given."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.config.reading import make_config
from train.step.schedule import learning_rate
from train.weights.merge import decay_weights

STEPS = st.lists(st.integers(0, 399), min_size=2, max_size=12, unique=True).map(sorted)


def decayed(updates: np.ndarray, first: int, last: int, peak: float) -> np.ndarray:
    """Weights from 0 on after a run at the peak rate whose last steps, from `first` to `last`, are wsd's decay to 0."""
    optimizer = {"schedule": "wsd", "learning_rate": peak, "warmup_steps": 0, "final_fraction": 0.0}
    optimizer["decay_fraction"] = (last - first) / last
    config = make_config({"optimizer": optimizer, "train": {"num_steps": last}})
    rates = np.broadcast_to(np.asarray(learning_rate(config)(np.arange(400)), np.float64)[:last], last)
    return -(rates[:, None] * updates[:last]).sum(0)


@given(first=st.integers(1, 20), span=st.integers(2, 20), seed=st.integers(0, 99))
def test_with_a_checkpoint_of_every_step_a_decay_is_that_of_the_schedule(first: int, span: int, seed: int):
    last, peak = first + span, 0.01
    updates = np.random.default_rng(seed).normal(size=(last, 5))
    constant = -peak * np.cumsum(updates, axis=0)
    steps = list(range(first, last + 1))
    merged = np.array(decay_weights(steps)) / (2 * (steps[-1] - steps[0])) @ constant[np.array(steps) - 1]
    np.testing.assert_allclose(merged, decayed(updates, first, last, peak), rtol=1e-5, atol=1e-7)


@given(steps=STEPS.filter(lambda steps: steps[0] > 0), seed=st.integers(0, 99))
def test_with_fewer_it_takes_the_updates_between_two_as_equal(steps: list[int], seed: int):
    peak, last = 0.01, steps[-1]
    updates = np.random.default_rng(seed).normal(size=(last, 3))
    for begin, end in itertools.pairwise(steps):
        updates[begin:end] = updates[begin]
    constant = -peak * np.cumsum(updates, axis=0)
    merged = np.array(decay_weights(steps)) / (2 * (steps[-1] - steps[0])) @ constant[np.array(steps) - 1]
    np.testing.assert_allclose(merged, decayed(updates, steps[0], last, peak), rtol=1e-5, atol=1e-6)


@given(steps=STEPS)
def test_the_weights_of_a_decay_are_those_of_an_average(steps: list[int]):
    weights = decay_weights(steps)
    assert sum(weights) == 2 * (steps[-1] - steps[0])
    assert min(weights) >= 0


def test_the_weights_of_a_decay_by_hand():
    # The first and the last have half a gap, and half a step is given back by the last update, whose rate is 0.
    assert decay_weights([100, 200, 300, 400]) == [101, 200, 200, 99]
    assert decay_weights([1, 2, 3]) == [2, 2, 0]
