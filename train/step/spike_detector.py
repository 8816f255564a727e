"""Spike detection: a loss or gradient norm that is not finite, and a loss that is an outlier.

A loss is an outlier if it exceeds the median of the last losses by `recovery.spike_deviations` robust standard
deviations (1.4826 × the median absolute deviation, which equals the standard deviation of a normal distribution).
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.config.recovery_config import RecoveryConfig

# Losses that must precede the first outlier, and the least rise above the median in nats a token.
LEAST_LOSSES = 32
LEAST_RISE = 0.1


class Anomaly(Exception):
    """A step (from 1) whose loss or gradients are not finite, or whose loss is an outlier; `problem` is one clause."""

    def __init__(self, step: int, problem: str, is_outlier: bool = False):
        super().__init__(f"step {step}: {problem}")
        self.step = step
        self.problem = problem
        self.is_outlier = is_outlier


class SpikeDetector:
    """Checks the figures of each step in order, and raises `Anomaly` for a spike.

    Its `history` has (loss, number of tokens) of the last good steps, oldest first; every checkpoint stores it.
    """

    def __init__(self, config: RecoveryConfig, history: Iterable[Sequence[float]] = ()):
        self._deviations = config.spike_deviations
        # Versions up to 0.7 also kept steps without a trained token, as losses of 0.
        self.history = collections.deque(((loss, tokens) for loss, tokens in history if tokens), config.spike_window)

    def check(self, record: Mapping[str, Any], reports: Iterable[Sequence[float]] = (), new_data: bool = False) -> None:
        """Raises Anomaly if training should not continue from this step.

        The record is the step's line of metrics.jsonl; the reports are (loss, gradient norm) as computed by each
        process. With `new_data` the mixture changed at this step, so the history of losses no longer applies.
        """
        step, loss, tokens = (record[name] for name in ("step", "loss", "loss_weight"))
        for figures in ((loss, record["grad_norm"]), *reports):
            for name, value in zip(("loss", "grad_norm"), figures, strict=True):
                if not math.isfinite(value):
                    raise Anomaly(step, f"{name} is {value}")
        if new_data:
            self.history.clear()
        if not tokens:
            return  # such a step has no loss
        # The last batches of a corpus hold few tokens, so their losses vary more.
        if self.history and tokens < statistics.median(tokens for _, tokens in self.history) / 2:
            return
        losses = [other for other, _ in self.history]
        if self._deviations and len(losses) >= LEAST_LOSSES:
            median = statistics.median(losses)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in losses)
            if loss - median > max(self._deviations * deviation, LEAST_RISE):
                raise Anomaly(
                    step,
                    f"loss {loss:.4f} is an outlier: the median of the {len(losses)} before is {median:.4f}, "
                    f"their robust deviation {deviation:.4f}",
                    is_outlier=True,
                )
        self.history.append((loss, tokens))
