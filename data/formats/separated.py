"""Plain text with several documents: a line of its own, always the same, stands between two of them.

That line is in no document, and neither is the line end before it. Empty documents are passed over.
"""

from collections.abc import Iterator
from typing import BinaryIO

from data.errors import BadText
from data.files.listing import File, open_file
from data.formats.content import RawDocument, ReadResult
from data.formats.jsonl import BYTE_ORDER_MARK


def first_document(file: File, begin: int, end: int, separator: str) -> int:
    """The byte at which the first document from `begin` on, above 0, begins; `end` or more where none does before it.

    Raises:
        InputError, BadText: as `open_file`.
    """
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
    """Each document that begins before a byte, as (byte, document or problem).

    Args:
        stream: stands at a document's beginning.
        at: the byte there.
        end: none: all documents.
        separator: none: the rest is one document.
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
        mark = len(BYTE_ORDER_MARK) if begin == 0 and content.startswith(BYTE_ORDER_MARK) else 0
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
