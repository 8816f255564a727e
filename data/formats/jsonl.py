"""JSON Lines: each line is an object, and one of its fields a document."""

import json
from collections.abc import Iterator
from pathlib import Path

from data.errors import InputError


def read(path: Path, begin: int, end: int, field: str) -> Iterator[tuple[int, str]]:
    """(byte offset, text) of each line that begins in this range; blank lines are passed over.

    Raises:
        InputError: a line is no JSON object with a text in this field, or too deeply nested; names the line.
    """
    with path.open("rb") as file:
        if begin:
            file.seek(begin - 1)
            file.readline()
        while (offset := file.tell()) < end:
            line = file.readline()
            if not line:
                return
            if line.isspace():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError(f"is no object but {type(record).__name__}")
                if field not in record:
                    raise ValueError(f"has no field {field!r}, only {', '.join(record)}; see data.text_field")
                if not isinstance(record[field], str):
                    raise ValueError(f"field {field!r} is no text but {type(record[field]).__name__}")
                record[field].encode()
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{line_number(path, offset)}: {error}") from None
            yield offset, record[field]


def line_number(path: Path, offset: int) -> int:
    """Of the line that begins at this byte, from 1."""
    with path.open("rb") as file:
        return file.read(offset).count(b"\n") + 1
