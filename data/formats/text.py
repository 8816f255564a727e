"""Plain text: a file is one document, which can be read in pieces, or several with a separating line between them.

Neither that line nor the line end before it belongs to a document. Empty documents are ignored. All functions raise as
`open_file`.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data.errors import BadText
from data.files.listing import File, open_file
from data.formats.content import RawDocument, ReadResult

# How far behind the wanted place a cut looks for the end of a line.
LINE_BYTES = 2**16


def piece_start(file: File, at: int, end: int) -> int:
    """Returns the byte at which a piece begins that should begin at `at`: after the line that holds it.

    In a very long line it begins at the next character. The result is from 0 to `end`.
    """
    if at <= 0 or at >= end:
        return min(max(at, 0), end)
    with open_file(file, at - 1, end) as stream:
        after = stream.read(min(LINE_BYTES, end - at + 1))
    if (newline := after.find(b"\n")) >= 0:
        return at + newline
    return next_character(file, at, end)


def next_character(file: File, at: int, end: int) -> int:
    """Returns the first byte from `at` on at which a character begins, at most `end`."""
    with open_file(file, at, end) as stream:
        after = stream.read(min(LINE_BYTES, end - at))
    # A character's later bytes are 10xxxxxx.
    return at + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), end - at)


def read_text(file: File, begin: int, end: int) -> str:
    """Returns the text of a byte range. Raises BadText if it is not UTF-8, and as `open_file`."""
    with open_file(file, begin, end) as stream:
        content = stream.read(end - begin)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadText(f"byte {begin + error.start} is no UTF-8 ({error.reason}); convert the file") from None


def first_document(file: File, begin: int, end: int, separator: str) -> int:
    """Returns the byte at which the first document from `begin` on (above 0) begins, or at least `end` without one."""
    # A separator that ends at `begin` or later begins here or later.
    at = max(begin - len(separator.encode()) - 2, 0)
    with open_file(file, max(at - 1, 0), end) as stream:
        if at > 0:
            at += len(stream.readline(end - at + 1)) - 1
        while at < end and (line := stream.readline(end - at)):
            at += len(line)
            if at >= begin and _is_separator(line, separator):
                return at
    return end


def read_separated(stream: BinaryIO, at: int, end: int | None, separator: str | None) -> Iterator[ReadResult]:
    """Yields (byte, document or problem) for each document that begins before `end`, if given.

    Args:
        stream: a stream at the beginning of a document, whose byte offset is `at`.
        separator: the separating line; None if the rest is one document.
    """
    while end is None or at < end:
        lines: list[bytes] = []
        begin, ends = at, False
        while not ends and (line := stream.readline()):
            at += len(line)
            ends = separator is not None and _is_separator(line, separator)
            if not ends:
                lines.append(line)
        content = b"".join(lines)
        mark = len(codecs.BOM_UTF8) if begin == 0 and content.startswith(codecs.BOM_UTF8) else 0
        if separator is not None:
            content = _without_end(content)
        try:
            if content[mark:]:
                yield begin, RawDocument(content[mark:].decode())
        except UnicodeDecodeError as error:
            yield begin, BadText(f"byte {begin + mark + error.start} is no UTF-8 ({error.reason}); convert it")
        if not ends:
            return


def _is_separator(line: bytes, separator: str) -> bool:
    return _without_end(line) == separator.encode()


def _without_end(line: bytes) -> bytes:
    return line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line
