"""Statistics of comparisons, against SciPy's tests and figures by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data.errors import InputError
from train.config.config import to_json
from train.config.reading import make_config
from train.run.comparison import (
    Outcome,
    compare_outcomes,
    deviation,
    first_crossing,
    outcome_of,
    paired_difference,
    tokens_after,
)
from train.run.folder import Run
from train.step.schedule import batch_size


@given(st.lists(st.tuples(st.floats(0.5, 3), st.floats(0.5, 3)), min_size=2, max_size=8))
def test_a_difference_is_that_of_scipys_paired_t_test(pairs: list[tuple[float, float]]):
    values, baseline = np.array(pairs).T
    if np.std(values - baseline) < 1e-6:
        return
    expected = stats.ttest_rel(values, baseline)
    low, high = expected.confidence_interval(0.95)
    found = paired_difference(values.tolist(), baseline.tolist())
    assert found.margin is not None
    assert (found.mean - found.margin, found.mean + found.margin) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.is_clear == (low > 0 or high < 0)


def test_a_difference_by_hand():
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    # Differences 1, 2 and 3: mean 2, deviation 1, and the t of 2 degrees of freedom is 4.3027.
    assert found.mean == 2.0
    assert found.margin == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not found.is_clear
    assert deviation([1.0, 2.0, 3.0]) == 1.0


def test_what_all_seeds_share_is_no_part_of_the_spread():
    seeds = np.array([0.0, 0.3, -0.4])
    gain = np.array([-0.05, -0.06, -0.055])
    found = paired_difference((1.8 + seeds + gain).tolist(), (1.8 + seeds).tolist())
    assert found.is_clear
    assert found.mean == pytest.approx(-0.055)


def test_one_pair_and_equal_pairs_have_no_false_certainty():
    assert paired_difference([1.0], [2.0]) == (-1.0, None, None)
    assert not paired_difference([1.0], [2.0]).is_clear
    assert not paired_difference([1.0, 2.0], [1.0, 2.0]).is_clear
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert not paired_difference([math.nan, 2.0], [1.0, 2.0]).is_clear
    assert deviation([1.0]) is None


def test_a_goal_is_crossed_between_two_evaluations():
    falls = [(100, 3.0), (400, 2.0), (1600, 1.0), (3200, 1.5)]
    # Half of the way from 2 to 1 is half of the logarithm from 400 to 1600.
    assert first_crossing(falls, 1.5) == pytest.approx(800)
    assert first_crossing(falls, 2.0) == 400
    assert first_crossing(falls, 3.5) == 100
    assert first_crossing(falls, 0.9) is None
    assert first_crossing([], 1.0) is None
    assert first_crossing([(100, math.nan), (400, 2.0)], 2.0) == 400


def outcome(*bits: float, factor: int = 1) -> Outcome:
    evaluations = [(100 * factor * 2**i, value) for i, value in enumerate(bits)]
    return Outcome(bits[-1], 2 * bits[-1], evaluations[-1][0], evaluations)


def test_figures_of_variants_are_by_tokens_and_by_time():
    outcomes = {
        "slow": [outcome(3.0, 2.0, 1.5), outcome(3.1, 2.2, 1.6)],
        "fast": [outcome(3.0, 1.5, 1.2), outcome(3.1, 1.6, 1.4)],
        "never": [outcome(3.0, 1.5, 1.2), outcome(3.1, 3.0, 2.9)],
    }
    step_seconds = {"slow": 1.0, "fast": 3.0, "never": 1.0}
    step_tokens = {"slow": 10, "fast": 20, "never": 10}
    found = compare_outcomes(outcomes, "slow", step_seconds, step_tokens)
    assert found["slow"].tokens_ratio == found["slow"].time_ratio == 1.0
    assert found["slow"].difference is None
    assert found["fast"].tokens_needed == [200, 200]
    assert found["fast"].tokens_ratio == 0.5
    # A step of twice the tokens takes three times as long.
    assert found["fast"].time_ratio == pytest.approx(0.75)
    assert found["fast"].difference is not None
    assert found["fast"].difference.mean == pytest.approx(-0.25)
    assert found["never"].tokens_needed == [200, None]
    assert found["never"].tokens_ratio is found["never"].time_ratio is None


def test_the_goal_of_a_seed_is_the_baselines_of_the_same_seed():
    outcomes = {"a": [outcome(3.0, 2.0), outcome(3.0, 1.0)], "b": [outcome(2.0, 1.5), outcome(2.0, 1.0)]}
    found = compare_outcomes(outcomes, "a", dict.fromkeys("ab", 1.0), dict.fromkeys("ab", 1))
    assert found["b"].tokens_needed == [100, 200]


def test_tokens_are_counted_over_a_ramp():
    config = make_config({"data": {"segment_length": 32}, "train": {"num_steps": 20, "batch_size": 16,
                          "batch_ramp_start": 4, "batch_ramp_steps": 10}})  # fmt: skip
    for step in (0, 1, 7, 20):
        assert tokens_after(config, step) == 32 * sum(batch_size(config, s) for s in range(step))


def test_an_outcome_is_of_all_held_out_documents_and_its_curve_of_the_same_ones(tmp_path: Path):
    run = Run(tmp_path)
    run.config_file.write_text(to_json(make_config({"data": {"segment_length": 32}, "train": {"batch_size": 8}})))
    common = {"loss": 1.0, "loss_weight": 1.0, "utilization": 1.0, "tokens_per_second": 1.0, "data_wait_seconds": 0.0}
    records: list[dict] = [{"step": step} | common for step in (1, 2, 3)]
    records[0] |= {"validation_bits_per_byte": 2.9, "validation_loss": 5.0}
    records[2] |= {"validation_bits_per_byte": 2.7, "validation_loss": 5.0}
    records[-1] |= {"held_out_bits_per_byte": 2.5, "held_out_loss": 4.0}
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert outcome_of(run) == Outcome(2.5, 4.0, 768, [(256, 2.9), (768, 2.7)])
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records[:2]))
    with pytest.raises(InputError, match="no evaluation after its last step"):
        outcome_of(run)
