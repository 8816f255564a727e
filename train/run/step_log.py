"""Logs with one line of JSON a step: metrics.jsonl and positions.jsonl."""

import json
import logging
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files.atomic import atomic_file
from train.run.json_lines import Record, is_count, is_moment, is_number, read_log
from train.run.storage import storage_errors
from train.run.trackers import Writer

log = logging.getLogger("ziggurat")
# What readers of metrics.jsonl rely on: the fields of every step, and those that are numbers.
ALWAYS = {"loss", "loss_weight", "utilization", "tokens_per_second", "data_wait_seconds"}
# Numbers that a step without a trained token lacks.
OF_TRAINED_TOKENS = {"loss", "grad_norm"}
NUMBERS = ALWAYS | {
    "grad_norm", "learning_rate", "peak_share", "memory_bytes", "slowest_process", "validation_loss",
    "validation_bits_per_byte", "validation_accuracy", "held_out_bits_per_byte", "held_out_accuracy", "held_out_tokens",
    "expert_load_most", "expert_load_least", "expert_load_entropy", "dead_experts",
    "accuracy", "margin", "chosen_reward", "rejected_reward", "kl", "answer_tokens",
    "entropy", "clipped", "reward", "reward_deviation", "equal_groups", "answer_length", "ended",
    "validation_reward", "validation_answer_length",
    *(f"{texts}_{name}" for texts in ("validation", "held_out")
      for name in ("preference_loss", "preference_accuracy", "margin", "pairs")),
}  # fmt: skip


class StepLog:
    """A file with at most one line a step, written by process 0 alone. After a restart no step is in it twice.

    Lines after the restored step, and damaged lines, are dropped. The trackers (`writers`) get the numbers, too.
    """

    def __init__(self, path: Path, step: int, writers: Sequence[Writer] = ()):
        self._path = path
        kept = [line for line, record in read_log(path, _has_step) if record["step"] <= step]
        with atomic_file(path) as partial:
            partial.write_text("".join(kept))
        self._file = path.open("a")
        self._writers = writers

    def write(self, record: dict[str, Any]) -> None:
        """Writes the line of one step."""
        with storage_errors("a line", self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for writer in self._writers:
            numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
            writer.write(record["step"], dict(scalars(numbers)))

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        with storage_errors("a line", self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs all lines to disk. A full disk is only a warning, because another error may have ended the run."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            log.warning("%s: not every line is on disk: %s", self._path, error.strerror)
        for writer in self._writers:
            writer.close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in a record by their paths: {"a": {"b": [1, 2]}} gives "a/b/0" and "a/b/1"."""
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): x for i, x in enumerate(value)}
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def read_metrics(path: Path) -> list[Record]:
    """Returns the lines of metrics.jsonl that are not damaged; none if there is no file."""
    return [record for _, record in read_log(path, _is_metrics)]


def held_out_figure(record: Mapping[str, Any], name: str) -> float:
    """Returns a figure of an evaluation on all held-out documents, or on those of the loop where that is all there is.

    Versions up to 0.7 named both alike.
    """
    return float(record.get(f"held_out_{name}", record[f"validation_{name}"]))


def trained_tokens(record: Mapping[str, Any]) -> float:
    """Returns the tokens that a step is trained on; of pairs of answers, the loss weight is the number of pairs."""
    return float(record.get("answer_tokens", record["loss_weight"]))


def median_rate(records: Sequence[Mapping[str, Any]]) -> float:
    """Returns the median of the tokens a second of steps that were not passed over; 0 without any."""
    return statistics.median_high([r["tokens_per_second"] for r in records if r["loss_weight"]] or [0.0])


def read_positions(path: Path, shape: tuple[int, ...]) -> list[Record]:
    """Returns the lines of positions.jsonl with whole numbers of this shape; none if there is no file."""

    def is_good(record: Record) -> bool:
        try:
            positions = np.array(record["positions"])
        except (KeyError, ValueError):
            return False
        return _has_step(record) and positions.dtype == np.int64 and positions.shape == shape and "data" in record

    return [record for _, record in read_log(path, is_good)]


def _has_step(record: Record) -> bool:
    return is_count(record.get("step"))


def _is_metrics(record: Record) -> bool:
    empty = OF_TRAINED_TOKENS if record.get("loss", 0) is None else set()
    numbers = (record[name] for name in (NUMBERS - empty) & record.keys())
    by_corpus, tasks = record.get("validation_by_corpus", {}), record.get("tasks", {})
    return (
        _has_step(record)
        and record.keys() >= ALWAYS
        and all(map(is_number, numbers))
        and is_moment(record.get("time", 0))
        and isinstance(tasks, dict)
        and isinstance(by_corpus, dict)
        and all(isinstance(of, dict) and is_number(of.get("validation_bits_per_byte")) for of in by_corpus.values())
        and isinstance(record.get("sample", ""), str)
        and ("sample" not in record or "validation_bits_per_byte" in record)
    )
