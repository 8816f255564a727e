"""Detects a loss or gradient that is not finite, and a loss that is an outlier."""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.config.recovery_config import RecoveryConfig

# Losses before the first that can stand out, and nats a token that it must be above the median in any case.
LEAST_LOSSES, LEAST_RISE = 32, 0.1


class Anomaly(Exception):
    """A step from which nothing good can follow.

    Attributes:
        step: of the run, from 1.
        problem: what is wrong with it.
    """

    def __init__(self, step: int, problem: str):
        super().__init__(f"step {step}: {problem}")
        self.step, self.problem = step, problem


class SpikeDetector:
    """Looks at each step's figures, in order.

    Attributes:
        history: (loss, tokens that it is of) of the last steps that were good, oldest first: kept in each checkpoint.

    Args:
        config: when a loss stands out.
        history: that the checkpoint has.
    """

    def __init__(self, config: RecoveryConfig, history: Iterable[Sequence[float]] = ()):
        self._deviations = config.spike_deviations
        self.history = collections.deque(((loss, tokens) for loss, tokens in history), config.spike_window)

    def check(self, record: Mapping[str, Any], seen: Iterable[Sequence[float]] = (), anew: bool = False) -> None:
        """Anomaly, where the figures of a step are none to go on with.

        Args:
            record: as in metrics.jsonl.
            seen: (loss, gradient norm) as each process has them.
            anew: the data of this step is another than before, so that other losses are usual.
        """
        step, loss, tokens = record["step"], record["loss"], record["loss_weight"]
        for figures in ((loss, record["grad_norm"]), *seen):
            for name, value in zip(("loss", "grad_norm"), figures, strict=True):
                if not math.isfinite(value):
                    raise Anomaly(step, f"{name} is {value}")
        if anew:
            self.history.clear()
        # The last batches of a corpus that ends are of few tokens, whose losses vary more.
        if self.history and tokens < statistics.median(tokens for _, tokens in self.history) / 2:
            return
        losses = [other for other, _ in self.history]
        if self._deviations and len(losses) >= LEAST_LOSSES:
            median = statistics.median(losses)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in losses)
            if loss - median > max(self._deviations * deviation, LEAST_RISE):
                raise Anomaly(
                    step,
                    f"loss {loss:.4f} stands out: the median of the {len(losses)} before is {median:.4f}, their robust "
                    f"deviation {deviation:.4f}",
                )
        self.history.append((loss, tokens))
