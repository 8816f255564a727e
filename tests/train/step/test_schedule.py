"""The learning rate and the size of the batch, step by step."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.optimizer_config import OptimizerConfig
from train.config.reading import make_config
from train.step.schedule import accumulation_parts, batch_size, learning_rate


def rates(num_steps: int, **optimizer: object) -> np.ndarray:
    schedule = learning_rate(
        make_config({"train": {"num_steps": num_steps}, "optimizer": {"learning_rate": 1.0, **optimizer}})
    )
    return np.array([float(schedule(step)) for step in range(num_steps)])


def test_cosine_rises_to_the_peak_and_falls_to_the_final_fraction():
    found = rates(101, warmup_steps=10, final_fraction=0.2)
    np.testing.assert_allclose(found[:11], np.arange(1, 12) / 11, rtol=1e-6)
    np.testing.assert_allclose(found[10:], 0.2 + 0.4 * (1 + np.cos(np.pi * np.arange(91) / 90)), rtol=1e-5)


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line():
    found = rates(100, schedule="wsd", warmup_steps=4, decay_fraction=0.2, final_fraction=0.0)
    assert rates(10, schedule="wsd", decay_fraction=0.65, final_fraction=0.0)[-1] == 0
    assert found[4:80].min() == 1.0
    np.testing.assert_allclose(found[79:], 1 - np.arange(21) / 20, atol=1e-6)


def test_linear_rises_to_the_peak_and_falls_in_a_line_to_the_final_fraction():
    found = rates(101, schedule="linear", warmup_steps=10, final_fraction=0.2)
    np.testing.assert_allclose(found[:11], np.arange(1, 12) / 11, rtol=1e-6)
    np.testing.assert_allclose(found[10:], 1 - 0.8 * np.arange(91) / 90, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [30, 300])
def test_inverse_sqrt_is_vaswanis_formula_scaled_to_the_peak_whatever_the_length_of_the_run(num_steps: int):
    found = rates(num_steps, schedule="inverse_sqrt", warmup_steps=9)
    number, warmup = np.arange(1, num_steps + 1), 10
    expected = np.minimum(number**-0.5, number * warmup**-1.5) * warmup**0.5
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.argmax() == 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_left_out_steps_are_parts_of_the_run(schedule: str):
    found = rates(200, schedule=schedule)
    assert found.argmax() == 10
    assert found[-1] == pytest.approx(0.1)
    assert found[0] > 0


def test_warm_up_is_a_twentieth_of_the_run_and_at_most_2000_steps():
    found = {num_steps: OptimizerConfig().steps_of_warmup(num_steps) for num_steps in (10, 100, 20_000, 40_000, 10**6)}
    assert found == {10: 0, 100: 5, 20_000: 1000, 40_000: 2000, 10**6: 2000}


def test_a_long_warm_up_leaves_the_rest_to_the_decay():
    found = rates(100, schedule="wsd", warmup_steps=90)
    assert found.argmax() == 90
    assert found[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_of_a_single_step_has_a_rate(schedule: str):
    assert rates(1, schedule=schedule)[0] > 0


@given(start=st.integers(1, 12), doublings=st.integers(1, 4), steps=st.integers(4, 50), parts=st.integers(0, 5))
def test_a_ramp_doubles_the_batch_in_equally_long_stages(start: int, doublings: int, steps: int, parts: int):
    full = start << doublings
    train = {"batch_ramp_start": start, "batch_ramp_steps": steps, "batch_size": full, "num_steps": 60}
    config = make_config({"train": train | {"accumulation_steps": 1 << min(parts, doublings)}})
    sizes = [batch_size(config, step) for step in range(60)]
    assert sizes[steps:] == [full] * (60 - steps)
    stages = {size: len(list(of_size)) for size, of_size in itertools.groupby(sizes[:steps])}
    assert list(stages) == [start << k for k in range(doublings)]
    assert max(stages.values()) - min(stages.values()) <= 1
    for rows in sizes:
        assert rows % config.num_streams == 0
        assert rows % accumulation_parts(config, rows) == 0
        part = rows // accumulation_parts(config, rows)
        assert part == min(rows, full // config.train.accumulation_steps)
        # What the mesh is checked for is enough for all stages.
        assert part % math.gcd(start, full // config.train.accumulation_steps) == 0


def test_without_a_ramp_every_batch_is_whole():
    config = make_config({"train": {"batch_size": 12, "accumulation_steps": 3}})
    assert {batch_size(config, step) for step in range(100)} == {12}
    assert accumulation_parts(config, 12) == 3
