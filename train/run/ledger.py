"""Healing: a step whose loss or gradient is no number, or whose loss stands out, takes the run back to its last save.

The first time the same rows are tried again, since the cause may have been a device's. If they stand out once more,
they are left out (as was done by hand in training PaLM, Chowdhery et al. 2022).

A loss stands out when it is so many robust standard deviations (1.4826 × the median of absolute deviations, which of a
normal distribution is the standard deviation) above the median of the last steps' losses.

Batches are counted from 1 in the order of the data as it is without anything left out, so that what is left out later
changes nothing of what was before.
"""

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.errors import Fault, InputError
from data.files.atomic import atomic_file
from train.config.recovery_config import RecoveryConfig
from train.devices.processes import broadcast_json, on_first_process
from train.run.storage import storage_errors
from train.step.spike_detector import Anomaly

RETRY, SKIP = "retry", "skip"
# Tries without a save between them, after which it is not the data that is wrong.
MOST_RETRIES = 10


class Ledger:
    """What a run has tried again and what it has left out: a line each of `recovery.jsonl`, on disk before it counts.

    It belongs to the run, not to a checkpoint: whoever reads the data of a step, now or later, leaves out the same.
    All processes call every method together; process 0 reads and writes.

    Attributes:
        skipped: numbers of the batches that are left out.
        skips: step (from 0) → how many batches are read and left out before its own.
    """

    def __init__(self, path: Path, config: RecoveryConfig, step: int):
        """Read it, and write down what the config leaves out besides.

        Args:
            path: of the file.
            config: the budget, and what is left out besides.
            step: how many are done.

        Raises:
            InputError: batches are to be left out that these steps have been trained on.
        """
        self._path, self._config, self._retries = path, config, 0
        self._entries: list[dict[str, Any]] = broadcast_json(lambda: read_ledger(path))
        self._update()
        if besides := sorted(config.batches() - set(self.skipped)):
            if besides[0] < (first := self.batch_of(step + 1)):
                raise InputError(
                    f"recovery.skips: batch {besides[0]} has been trained on already; the next one is {first}"
                )
            self._write({"problem": "recovery.skips", "action": SKIP, "batches": besides})

    def batch_of(self, step: int) -> int:
        """The number of the batch of a step, from 1."""
        return step + sum(count for before, count in self.skips.items() if before < step)

    def mark_saved(self) -> None:
        """A checkpoint has been made."""
        self._retries = 0

    def decide(self, anomaly: Anomaly, step: int) -> str:
        """RETRY or SKIP, written down.

        Args:
            anomaly: what was found.
            step: of the checkpoint that the run has gone back to.

        Raises:
            InputError: more batches would be left out than the budget has.
            Fault: it has been tried again and again, each time with another batch.
        """
        batch = self.batch_of(anomaly.step)
        entry: dict[str, Any] = {"step": anomaly.step, "batch": batch, "problem": anomaly.problem, "action": RETRY}
        if not any(other.get("batch") == batch for other in self._entries):
            self._retries += 1
            if self._retries > MOST_RETRIES:
                raise Fault(
                    f"{anomaly}; {MOST_RETRIES} other steps have stood out since step {step} was saved, so it is not "
                    "the data: look at the devices, or lower optimizer.learning_rate"
                )
            self._write(entry)
            return RETRY
        # What the checkpoint has been trained on cannot be left out.
        first = max(batch - self._config.skip_batches + 1, self.batch_of(step + 1))
        batches = sorted(set(range(first, batch + 1)) - set(self.skipped))
        done = sum(len(other.get("batches", [])) for other in self._entries if "batch" in other)
        if done + len(batches) > (budget := self._config.max_skipped_batches):
            raise InputError(
                f"{anomaly}; {done} batches have been left out already, and recovery.max_skipped_batches is {budget}: "
                "look at what they hold (`skip` in events.jsonl), lower optimizer.learning_rate, begin again with an "
                "earlier checkpoint (--config.train.init_from), or raise the budget"
            )
        self._write(entry | {"action": SKIP, "batches": batches})
        return SKIP

    def _update(self) -> None:
        self.skipped = sorted(skipped_batches(self._entries))
        self.skips = skips_by_step(self.skipped)

    def _write(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        self._update()
        on_first_process(lambda: write_ledger(self._path, self._entries))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The entries of a `recovery.jsonl`; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_ledger(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """All of it at once, on disk when this returns."""
    with storage_errors("what is left out", path), atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def inherited_entries(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a fork takes over of its parent's ledger: what is left out, which its own budget does not pay for."""
    batches = sorted(skipped_batches(entries))
    return (
        [{"problem": "left out by the run that this began with", "action": SKIP, "batches": batches}] if batches else []
    )


def skipped_batches(entries: Iterable[Mapping[str, Any]]) -> set[int]:
    """The batches that a ledger leaves out."""
    return {batch for entry in entries for batch in entry.get("batches", [])}


def skips_by_step(batches: Iterable[int]) -> dict[int, int]:
    """`Ledger.skips` of the numbers of batches: each moves those behind it up by one step."""
    return dict(collections.Counter(batch - 1 - i for i, batch in enumerate(sorted(batches))))
