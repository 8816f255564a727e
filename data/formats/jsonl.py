"""JSON Lines: each line is an object, and one of its fields holds a document."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from data.errors import BadText
from data.formats.content import MAX_DOCUMENT_BYTES, RawDocument, ReadResult, read_line, too_long
from data.formats.fields import Fields

# Characters of the list of a record's fields in a message.
MOST_NAMES = 200


def read_jsonl(stream: BinaryIO, at: int, end: int | None, fields: Fields) -> Iterator[ReadResult]:
    """Yields (byte, document or problem) for each line that begins before `end`, if given, and is not blank.

    Args:
        stream: a stream at the beginning of a line, whose byte offset is `at`.
    """
    while end is None or at < end:
        line, length = read_line(stream, at)
        if not length:
            return
        begin, at = at, at + length
        if not line or line.isspace():
            continue
        try:
            yield begin, parse_line(line, fields) if length <= MAX_DOCUMENT_BYTES else too_long()
        except BadText as error:
            yield begin, error


def parse_line(line: bytes, fields: Fields) -> RawDocument:
    """Returns the document of a line.

    Raises:
        BadText: the line is not a JSON object with these fields, or is nested too deeply.
    """
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadText(f"byte {error.start} of the line is no UTF-8 ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise BadText(f"is no JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise BadText(f"is JSON that cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise BadText(f"is no object but {type(record).__name__}")
    read = _field if fields.conversations else _text
    return fields.document({name: read(record, name, setting) for name, setting in fields.columns.items()})


def _field(record: dict[str, object], name: str, setting: str) -> object:
    if name not in record:
        raise BadText(f"has no field {name!r}, only {', '.join(record)[:MOST_NAMES]}; see {setting}")
    return record[name]


def _text(record: dict[str, object], name: str, setting: str) -> str:
    value = _field(record, name, setting)
    if not isinstance(value, str):
        raise BadText(f"field {name!r} is no text but {type(value).__name__}; see {setting}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"field {name!r} has half a character at {error.start}: {value[error.start]!r}") from None
    return value
