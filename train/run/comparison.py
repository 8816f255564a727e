"""Compares finished runs of several variants over the same seeds: figures at the end, and the way to a baseline's.

A seed gives variants of the same shapes the same initial weights, and those of the same data the same order, so that
what two of them differ by is taken seed by seed: most of the spread over seeds is common to both, and cancels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from data.errors import InputError
from train.config.config import Config
from train.run.folder import Run
from train.run.step_log import held_out_figure, read_metrics
from train.step.schedule import rows_between

CONFIDENCE = 0.95


class Outcome(NamedTuple):
    """The end of one run, and its way there.

    Attributes:
        bits: bits a byte of all held-out documents at the end.
        loss: their loss at the end, in nats a token.
        tokens: positions that were read up to the end.
        evaluations: (tokens so far, bits a byte) of each evaluation of some of the documents, always the same.
    """

    bits: float
    loss: float
    tokens: int
    evaluations: list[tuple[int, float]]


class Difference(NamedTuple):
    """The mean of differences between pairs, and how sure it is.

    Attributes:
        mean: the mean over pairs of value − baseline.
        margin: half of the interval that holds the true mean in 95% of experiments (paired t); None with one pair.
        p_value: probability of a mean at least as far from 0 if there were no difference; None with one pair.
    """

    mean: float
    margin: float | None
    p_value: float | None

    @property
    def is_clear(self) -> bool:
        """True where the interval leaves out 0: the difference is more than the seeds'."""
        return self.margin is not None and abs(self.mean) > self.margin


class Figures(NamedTuple):
    """The figures of one variant in a comparison; lists have one number a seed.

    Attributes:
        tokens_needed: tokens with which it comes to the baseline's last evaluation of the same seed, or None.
        tokens_ratio: their mean as a share of the baseline's tokens; None where a seed never comes there.
        time_ratio: the same for the time of the steps.
        difference: how its bits a byte differ from the baseline's; None for the baseline itself.
    """

    bits: list[float]
    loss: list[float]
    tokens: list[int]
    step_seconds: float
    tokens_needed: list[float | None]
    tokens_ratio: float | None
    time_ratio: float | None
    difference: Difference | None


def tokens_after(config: Config, step: int) -> int:
    """Returns the positions that a run has read after a number of steps."""
    return rows_between(config, 0, step) * config.data.segment_length


def outcome_of(run: Run) -> Outcome:
    """Returns the outcome of a finished run. Raises InputError where it has evaluated nothing."""
    config, records = run.load_config(), read_metrics(run.metrics)
    evaluated = [record for record in records if "validation_bits_per_byte" in record]
    if not evaluated or evaluated[-1] is not records[-1]:
        raise InputError(f"{run.folder} has no evaluation after its last step, so it cannot be compared")
    evaluations = [(tokens_after(config, r["step"]), r["validation_bits_per_byte"]) for r in evaluated]
    bits, loss = (held_out_figure(evaluated[-1], name) for name in ("bits_per_byte", "loss"))
    return Outcome(bits, loss, evaluations[-1][0], evaluations)


def first_crossing(evaluations: Sequence[tuple[int, float]], goal: float) -> float | None:
    """Returns the tokens after which evaluations first come down to a goal; None where they never do.

    Between two evaluations bits are taken as a line over the logarithm of tokens, which is nearly how they fall.
    """
    before: tuple[int, float] | None = None
    for tokens, bits in evaluations:
        if bits <= goal:
            if before is None:
                return float(tokens)
            part = (before[1] - goal) / (before[1] - bits)
            return float(before[0] * (tokens / before[0]) ** part)
        before = (tokens, bits) if math.isfinite(bits) else None
    return None


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Returns the mean difference of pairs with the interval and the probability of a paired t-test (Student 1908)."""
    differences = np.array(values) - np.array(baseline)
    n, mean = len(differences), float(differences.mean())
    if n < 2:
        return Difference(mean, None, None)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    margin = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    if error == 0:
        return Difference(mean, margin, 1.0 if mean == 0 else 0.0)
    return Difference(mean, margin, float(2 * stdtr(n - 1, -abs(mean / error))))


def deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation of a sample, or None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare_outcomes(
    outcomes: Mapping[str, Sequence[Outcome]],
    baseline: str,
    step_seconds: Mapping[str, float],
    step_tokens: Mapping[str, int],
) -> dict[str, Figures]:
    """Returns the figures of each variant; without those that need the baseline's, if it has no outcomes.

    Args:
        outcomes: those of each variant's runs, in the same order of seeds.
        baseline: the variant that the others are compared with.
        step_seconds: seconds of a step of each variant.
        step_tokens: positions of a full step of each variant.
    """
    figures = {}
    of_baseline = outcomes.get(baseline)
    if of_baseline is None:
        return {name: figures_alone(ends, step_seconds[name]) for name, ends in outcomes.items()}
    goals = [outcome.evaluations[-1][1] for outcome in of_baseline]
    baseline_tokens = float(np.mean([outcome.tokens for outcome in of_baseline]))
    token_seconds = {name: seconds / step_tokens[name] for name, seconds in step_seconds.items()}
    for name, ends in outcomes.items():
        bits = [end.bits for end in ends]
        needed: list[float | None] = [float(end.tokens) for end in ends]
        if name != baseline:
            needed = [first_crossing(end.evaluations, goal) for end, goal in zip(ends, goals, strict=True)]
        reached = [tokens for tokens in needed if tokens is not None]
        ratio = float(np.mean(reached)) / baseline_tokens if len(reached) == len(needed) else None
        slower = token_seconds[name] / token_seconds[baseline]
        difference = paired_difference(bits, [end.bits for end in of_baseline]) if name != baseline else None
        figures[name] = figures_alone(ends, step_seconds[name])._replace(
            tokens_needed=needed,
            tokens_ratio=ratio,
            time_ratio=None if ratio is None else ratio * slower,
            difference=difference,
        )
    return figures


def figures_alone(ends: Sequence[Outcome], step_seconds: float) -> Figures:
    """Returns the figures of a variant as far as they need no baseline."""
    bits, loss, tokens = ([getattr(end, name) for end in ends] for name in ("bits", "loss", "tokens"))
    return Figures(bits, loss, tokens, step_seconds, [None] * len(ends), None, None, None)
