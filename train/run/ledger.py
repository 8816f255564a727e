"""The ledger: the batches that a run has retried and skipped after a spike or a non-finite value.

The first time, the run returns to its last save and tries the same rows again, since the cause may have been a device.
If they are an outlier once more, they are skipped (as was done by hand in training PaLM, Chowdhery et al. 2022).
`train.step.spike_detector` defines an outlier.

Batches are counted from 1 in the order of the data with nothing skipped, so that later skips do not renumber them.
"""

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data.errors import Fault, InputError
from data.files.atomic import atomic_file
from train.config.recovery_config import RecoveryConfig
from train.devices.collectives import broadcast_json, on_first_process
from train.run.json_lines import Record, is_count, read_whole
from train.run.storage import storage_errors
from train.step.spike_detector import Anomaly

RETRY, SKIP = "retry", "skip"
# Retries without a save between them, after which the cause is not the data.
MOST_RETRIES = 10
# Batches without which the step after a save was tried, after which it is the state or the settings that give NaN.
MOST_FIRST_BATCHES = 3


class Ledger:
    """The retried and skipped batches: a line each of `recovery.jsonl`, on disk before it takes effect.

    It belongs to the run, not to a checkpoint: whoever reads the data of a step, now or later, skips the same batches.
    All processes call every method together; process 0 reads and writes.
    """

    def __init__(self, path: Path, config: RecoveryConfig, step: int):
        """Reads the ledger, and adds the batches of `recovery.skips`.

        Raises InputError if the steps so far, up to `step`, have been trained on batches that should be skipped.
        """
        self._path = path
        self._config = config
        self._retries = 0
        self._first_batches: set[int] = set()
        self._entries: list[dict[str, Any]] = broadcast_json(lambda: read_ledger(path))
        self._update()
        if batches := sorted(config.batches() - set(self.skipped)):
            if (batch := batches[0]) < (first := self.batch_of(step + 1)):
                raise InputError(f"recovery.skips: batch {batch} has been trained on already; the next one is {first}")
            self._write({"problem": "recovery.skips", "action": SKIP, "batches": batches})

    def batch_of(self, step: int) -> int:
        """Returns the number, from 1, of the batch of a step."""
        return step + sum(count for before, count in self.skips.items() if before < step)

    def mark_saved(self) -> None:
        """Notes that a checkpoint has been made."""
        self._retries = 0
        self._first_batches.clear()

    def decide(self, anomaly: Anomaly, step: int) -> str:
        """Returns RETRY or SKIP after an anomaly and the return to the save of `step`, and writes the decision.

        Raises:
            InputError: the budget of skipped batches would be exceeded; or new weights give NaN whatever the batch.
            Fault: many batches have been retried without a save between them, each time another; or saved weights give
                NaN whatever the batch.
        """
        batch = self.batch_of(anomaly.step)
        if anomaly.step == step + 1 and not anomaly.is_outlier:
            self._first_batches.add(batch)
            if len(self._first_batches) == MOST_FIRST_BATCHES:
                error = Fault if step else InputError
                raise error(
                    f"{anomaly}, with each of {MOST_FIRST_BATCHES} batches after step {step}, so it is not the data: "
                    "look at the model's and the optimizer's settings, and at the devices"
                )
        entry: dict[str, Any] = {"step": anomaly.step, "batch": batch, "problem": anomaly.problem, "action": RETRY}
        if not any(other.get("batch") == batch for other in self._entries):
            self._retries += 1
            if self._retries > MOST_RETRIES:
                raise Fault(
                    f"{anomaly}; {MOST_RETRIES} other steps have been outliers since step {step} was saved, so it is "
                    "not the data: look at the devices, or lower optimizer.learning_rate"
                )
            self._write(entry)
            return RETRY
        # Batches that the checkpoint has been trained on cannot be skipped.
        first = max(batch - self._config.skip_batches + 1, self.batch_of(step + 1))
        batches = sorted(set(range(first, batch + 1)) - set(self.skipped))
        done = sum(len(other.get("batches", [])) for other in self._entries if "batch" in other)
        if done + len(batches) > (budget := self._config.max_skipped_batches):
            raise InputError(
                f"{anomaly}; {done} batches have been skipped already, and recovery.max_skipped_batches is {budget}: "
                "look at what they hold (`skip` in events.jsonl), lower optimizer.learning_rate, begin again with an "
                "earlier checkpoint (--config.train.init_from), or raise the budget"
            )
        self._write(entry | {"action": SKIP, "batches": batches})
        return SKIP

    def _update(self) -> None:
        self.skipped = sorted(skipped_batches(self._entries))
        # Maps a step (from 0) to the number of batches that are read and skipped before its own.
        self.skips = skips_by_step(self.skipped)

    def _write(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)
        self._update()
        on_first_process(lambda: write_ledger(self._path, self._entries))


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of a `recovery.jsonl`; none if there is no file. InputError if one is damaged."""
    return read_whole(path, _is_entry, "restore it from a copy: it says which batches are skipped")


def _is_entry(record: Record) -> bool:
    batches = record.get("batches", [])
    return (
        record.get("action") in (RETRY, SKIP)
        and is_count(record.get("step", 0))
        and is_count(record.get("batch", 1))
        and isinstance(batches, list)
        and all(is_count(batch) and batch > 0 for batch in batches)
    )


def write_ledger(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes all entries atomically; they are on disk when this returns."""
    with storage_errors("the ledger of skipped batches", path), atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def inherited_entries(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the entries that a fork inherits: the batches its parent skips, which cost no budget of its own."""
    entry = {"problem": "left out by the run that this began with", "action": SKIP}
    batches = sorted(skipped_batches(entries))
    return [entry | {"batches": batches}] if batches else []


def skipped_batches(entries: Iterable[Mapping[str, Any]]) -> set[int]:
    """Returns the batches that a ledger skips."""
    return {batch for entry in entries for batch in entry.get("batches", [])}


def skips_by_step(batches: Iterable[int]) -> dict[int, int]:
    """Returns `Ledger.skips` for the numbers of batches: each moves those after it up by one step."""
    return dict(collections.Counter(batch - 1 - i for i, batch in enumerate(sorted(batches))))
