"""Logs with one line of JSON a step: metrics.jsonl and positions.jsonl."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files.atomic import atomic_file
from train.run.storage import storage_errors
from train.run.trackers import Writer

log = logging.getLogger("ziggurat")


class StepLog:
    """A file with at most one line a step, written by process 0 alone. After a restart no step is in it twice.

    Lines after the restored step, and a torn last line, are dropped. The trackers (`writers`) get the numbers, too.
    """

    def __init__(self, path: Path, step: int, writers: Sequence[Writer] = ()):
        self._path = path
        kept = [line for line, record in read_step_log(path) if record["step"] <= step]
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


def read_step_log(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the (line, record) pairs of a `StepLog`, up to the first torn line; none if there is no file."""
    records = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if line.endswith("\n"):
            records.append((line, record))
    return records
