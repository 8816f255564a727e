"""Reads the files of JSON lines in a run's folder, lines of which a kill, a disk or a person may have damaged."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files.json_file import parse_json

log = logging.getLogger("ziggurat")
Record = dict[str, Any]
# The end of the year 9999, in seconds since 1970.
LAST_MOMENT = 253_402_300_000


def is_count(value: object) -> bool:
    """True for a whole number from 0 on that arrays can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: object) -> bool:
    """True for a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_moment(value: object) -> bool:
    """True for seconds since 1970."""
    return is_number(value) and 0 <= value <= LAST_MOMENT  # type: ignore[operator]


def read_log(path: Path, is_good: Callable[[Record], bool]) -> list[tuple[str, Record]]:
    """Returns the (line, record) pairs of a log; none if there is no file.

    Damaged lines are left out with a warning, and a torn last line without one: the log was being written.
    """
    lines = list(_lines(path, is_good))
    if lines and lines[-1][2] is None and not lines[-1][1].endswith("\n"):
        del lines[-1]
    if damaged := [number for number, _, record in lines if record is None]:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        log.warning("%s:%d is damaged%s: lines that are damaged are left out", path, damaged[0], more)
    return [(line.rstrip("\n") + "\n", record) for _, line, record in lines if record is not None]


def read_whole(path: Path, is_good: Callable[[Record], bool], remedy: str) -> list[Record]:
    """Returns all records of a file that is written as a whole, none without a file. InputError if one is damaged."""
    records = []
    for number, _, record in _lines(path, is_good):
        if record is None:
            raise InputError(f"{path}:{number} is damaged; {remedy}")
        records.append(record)
    return records


def _lines(path: Path, is_good: Callable[[Record], bool]) -> Iterator[tuple[int, str, Record | None]]:
    """Yields (number, line, record or None if it is damaged) of all lines."""
    content = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        record = None
        try:
            value = parse_json(line.decode())
            record = value if isinstance(value, dict) and is_good(value) else None
        except ValueError:  # UTF-8 that is damaged, too
            pass
        yield number, line.decode(errors="replace"), record
