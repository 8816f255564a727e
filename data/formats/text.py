"""Plain text: a file is one document, which can be read in pieces, or several with a separating line between them.

Neither that line nor the line end before it belongs to a document. Empty documents are ignored. All functions raise as
`open_file`.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data.errors import BadText
from data.files.listing import File, open_file
from data.formats.content import MAX_DOCUMENT_BYTES, RawDocument, ReadResult, read_line, too_long

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
    """Returns the text of a byte range, without a byte-order mark.

    Raises BadText if it is not UTF-8, and as `open_file`.
    """
    with open_file(file, begin, end) as stream:
        content = stream.read(end - begin)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadText(f"byte {begin + error.start} is no UTF-8 ({error.reason}); convert the file") from None
    return text if begin else text.removeprefix("\ufeff")


def first_document(file: File, begin: int, end: int, separator: str) -> int:
    """Returns the byte at which the first document from `begin` on (above 0) begins, or at least `end` without one."""
    # A separator that ends at `begin` or later begins here or later, after a byte-order mark maybe.
    at = max(begin - len(separator.encode()) - 2 - len(codecs.BOM_UTF8), 0)
    with open_file(file, max(at - 1, 0), end) as stream:
        if at > 0:
            at += len(stream.readline(end - at + 1)) - 1
        while at < end and (line := stream.readline(end - at)):
            mark = codecs.BOM_UTF8 if at == 0 else b""
            at += len(line)
            if at >= begin and _without_end(line.removeprefix(mark)) == separator.encode():
                return at
    return end


def has_separator(stream: BinaryIO, separator: str, size: int) -> bool:
    """True if a line of the stream's first `size` bytes is the separator."""
    while size > 0 and (line := stream.readline(size)):
        if _without_end(line) == separator.encode():
            return True
        size -= len(line)
    return False


def read_separated(stream: BinaryIO, at: int, end: int | None, separator: str | None) -> Iterator[ReadResult]:
    """Yields (byte, document or problem) for each document that begins before `end`, if given.

    Args:
        stream: a stream at the beginning of a document, whose byte offset is `at`.
        separator: the separating line; None if the rest is one document.
    """
    wanted = None if separator is None else separator.encode()
    while end is None or at < end:
        lines: list[bytes] = []
        size = 0
        begin, ends = at, False
        while not ends:
            line, length = read_line(stream, at)
            if not length:
                break
            at += length
            ends = wanted is not None and line.startswith(wanted) and _without_end(line) == wanted
            if not ends:
                size += length
                if size <= MAX_DOCUMENT_BYTES:
                    lines.append(line)
        content = b"".join(lines)
        try:
            if size > MAX_DOCUMENT_BYTES:
                yield begin, too_long()
            elif encoded := content if separator is None else _without_end(content):
                yield begin, RawDocument(encoded.decode())
        except UnicodeDecodeError as error:
            first = begin + size - len(content)  # after a byte-order mark
            yield begin, BadText(f"byte {first + error.start} is no UTF-8 ({error.reason}); convert it")
        if not ends:
            return


def _without_end(line: bytes) -> bytes:
    return line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line
