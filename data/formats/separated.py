"""Plain text with several documents, separated by a line that is always the same.

Neither that line nor the line end before it belongs to a document. Empty documents are ignored.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data.errors import BadText
from data.files.listing import File, open_file
from data.formats.content import RawDocument, ReadResult


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
