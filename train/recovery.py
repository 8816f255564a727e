"""Healing: a step whose loss or gradient is no number, or whose loss stands out, takes the run back to its last save.

The first time the same rows are tried again, since the cause may have been a device's. If the step stands out once
more, its rows are left out (as was done by hand in training PaLM, Chowdhery et al. 2022).

A loss stands out when it is so many robust standard deviations (1.4826 × the median of absolute deviations, which of a
normal distribution is the standard deviation) above the median of the last steps' losses.
"""

import collections
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.errors import InputError
from train.mesh import once, told
from train.recovery_config import RecoveryConfig
from train.storage import writing

# Losses before the first that can stand out, and nats a token that it must be above the median in any case.
LEAST_LOSSES, LEAST_RISE = 32, 0.1
RETRY, SKIP = "retry", "skip"


class Anomaly(Exception):
    """A step from which nothing good can follow.

    Attributes:
        step: of the run, from 1.
        problem: what is wrong with it.
    """

    def __init__(self, step: int, problem: str):
        super().__init__(f"step {step}: {problem}")
        self.step, self.problem = step, problem


class Judge:
    """Looks at each step's figures, in order.

    Attributes:
        losses: of the last steps that were good, oldest first: kept in each checkpoint.

    Args:
        config: when a loss stands out.
        losses: that the checkpoint has.
    """

    def __init__(self, config: RecoveryConfig, losses: Iterable[float] = ()):
        self._deviations = config.spike_deviations
        self.losses = collections.deque(losses, config.spike_window)

    def check(self, record: Mapping[str, Any], anew: bool = False) -> None:
        """Anomaly, where the figures of a step are none to go on with.

        Args:
            record: as in metrics.jsonl.
            anew: the data of this step is another than before, so that other losses are usual.
        """
        loss = record["loss"]
        if anew:
            self.losses.clear()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                raise Anomaly(record["step"], f"{name} is {record[name]}")
        if self._deviations and len(self.losses) >= LEAST_LOSSES:
            median = statistics.median(self.losses)
            deviation = 1.4826 * statistics.median(abs(other - median) for other in self.losses)
            if loss - median > max(self._deviations * deviation, LEAST_RISE):
                raise Anomaly(
                    record["step"],
                    f"loss {loss:.4f} stands out: the median of the {len(self.losses)} before is {median:.4f}, their "
                    f"robust deviation {deviation:.4f}",
                )
        self.losses.append(loss)


class Ledger:
    """What a run has tried again and what it has left out: a line each of `recovery.jsonl`, on disk before it counts.

    It belongs to the run, not to a checkpoint: whoever reads the data of a step, now or later, leaves out the same.
    All processes call every method together; process 0 reads and writes.

    Attributes:
        skips: step (from 0) → how many batches of its size are read and left out before its own.
    """

    def __init__(self, path: Path, config: RecoveryConfig):
        self._path, self._config = path, config
        self._entries: list[dict[str, Any]] = told(lambda: read_ledger(path))
        self.skips = skipped_batches(config, self._entries)

    def decide(self, anomaly: Anomaly, step: int) -> str:
        """RETRY or SKIP, written down.

        Args:
            anomaly: what was found.
            step: of the checkpoint that the run has gone back to.

        Raises:
            InputError: more batches would be left out than the budget has.
        """
        tried = [entry["action"] for entry in self._entries if entry["found"] == anomaly.step][-1:] == [RETRY]
        entry: dict[str, Any] = {"found": anomaly.step, "problem": anomaly.problem, "action": SKIP if tried else RETRY}
        if tried:
            batches, budget = self._config.skip_batches, self._config.max_skipped_batches
            done = sum(entry.get("batches", 0) for entry in self._entries)
            if done + batches > budget:
                raise InputError(
                    f"{anomaly}; {done} batches have been left out already, and recovery.max_skipped_batches is "
                    f"{budget}: look at what they hold (`ziggurat inspect data`), lower optimizer.learning_rate, or "
                    "raise the budget"
                )
            # The last of them is the one that was found, but what a checkpoint has trained on cannot be left out.
            entry |= {"step": max(anomaly.step - batches, step) + 1, "batches": batches}
        once(lambda: self._write(entry))
        self._entries.append(entry)
        self.skips = skipped_batches(self._config, self._entries)
        return str(entry["action"])

    def _write(self, entry: Mapping[str, Any]) -> None:
        kept = read_ledger(self._path)
        partial = self._path.with_suffix(".partial")
        with writing("what is left out", self._path), partial.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in [*kept, entry])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The entries of a `recovery.jsonl`; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def skipped_batches(config: RecoveryConfig, entries: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """`Ledger.skips` of a ledger's entries, and of what the config leaves out."""
    found = collections.Counter({int(step) - 1: batches for step, batches in config.skips.items()})
    for entry in entries:
        if entry["action"] == SKIP:
            found[entry["step"] - 1] += entry["batches"]
    return dict(found)
