"""Reads the files of JSON lines in a run's folder, lines of which a kill, a disk or a person may have damaged."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files.json_file import DEEPEST, LARGEST_FILE, parse_json

log = logging.getLogger("ziggurat")
Record = dict[str, Any]
# The end of the year 9999, in seconds since 1970.
LAST_MOMENT = 253_402_300_000


def is_count(value: object) -> bool:
    """True for a whole number from 0 on that arrays can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: object) -> bool:
    """True for a number, which may be NaN or infinite."""
    return isinstance(value, float) or (type(value) is int and -(2**53) < value < 2**53)


def is_moment(value: object) -> bool:
    """True for seconds, as of a clock since 1970."""
    return is_number(value) and 0 <= value <= LAST_MOMENT  # type: ignore[operator]


def read_log(path: Path, is_good: Callable[[Record], bool]) -> list[tuple[str, Record]]:
    """Returns the (line, record) pairs of a log; none if there is no file.

    Damaged lines are left out with a warning, and a torn last line without one: the log was being written.
    """
    kept, damaged = [], []
    for number, line, record in _lines(path, is_good):
        if record is not None:
            kept.append((line if line.endswith("\n") else f"{line}\n", record))
        elif line.endswith("\n"):
            damaged.append(number)
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        log.warning("%s:%d is damaged%s: lines that are damaged are left out", path, damaged[0], more)
    return kept


def read_whole(path: Path, is_good: Callable[[Record], bool], remedy: str) -> list[Record]:
    """Returns all records of a file that is written as a whole, none without a file. InputError if one is damaged."""
    records = []
    for number, _, record in _lines(path, is_good):
        if record is None:
            raise InputError(f"{path}:{number} is damaged; {remedy}")
        records.append(record)
    return records


def _lines(path: Path, is_good: Callable[[Record], bool]) -> Iterator[tuple[int, str, Record | None]]:
    """Yields (number, line, record or None if it is damaged) of all lines.

    What is no file counts as one damaged line, and a line longer than `LARGEST_FILE` as several.
    """
    if not os.path.lexists(path):
        return
    if not path.is_file():  # A pipe would be waited for, and a device may have no end.
        yield 1, "\n", None
        return
    with path.open("rb") as file:
        for number, piece in enumerate(iter(lambda: file.readline(LARGEST_FILE), b""), 1):
            line = piece.decode(errors="surrogateescape")
            record = None
            try:
                if not line.isascii():
                    line.encode()  # raises ValueError for what was no UTF-8
                # The library's own function is twice as fast.
                value = parse_json(line) if line.count("{") + line.count("[") > DEEPEST else json.loads(line)
                record = value if isinstance(value, dict) and is_good(value) else None
            except ValueError:
                pass
            yield number, line, record
