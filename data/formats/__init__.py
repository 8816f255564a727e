"""Formats of corpora: documents read from a byte range of a file.

Every document has a place by which it is found again: the byte at which it begins (in a compressed file, of the
decompressed text), or the row of a .parquet.

May import `data.errors`, `data.config` and `data.files`.
"""

from collections.abc import Iterator

from data.errors import BadText
from data.files.listing import File, is_local, open_file
from data.formats import jsonl, parquet, text
from data.formats.compression import COMPRESSIONS, open_text, skip_bytes
from data.formats.content import Answers as Answers
from data.formats.content import RawDocument as RawDocument
from data.formats.content import ReadResult as ReadResult
from data.formats.content import Sequence as Sequence
from data.formats.conversation import Conversations as Conversations
from data.formats.fields import Fields as Fields

ENDINGS = (".txt", ".jsonl", ".parquet", *(kind + end for kind in (".txt", ".jsonl", ".json") for end in COMPRESSIONS))
# Up to this byte of a local file, a message names the line, for which the file is read; after it, the byte.
COUNTED_BYTES = 2**26


def format_and_compression(name: str) -> tuple[str, str]:
    """Returns the format and the compression of a file name: (".jsonl", ".gz"), or (".txt", "")."""
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    format_ = "." + name.removesuffix(compression).rpartition(".")[2]
    # A .json.gz, as in C4 and Dolma, holds JSON Lines.
    return ".jsonl" if format_ == ".json" else format_, compression


def read_documents(file: File, begin: int, end: int, fields: Fields, place: int = 0) -> Iterator[ReadResult]:
    """Yields the documents that begin in stored bytes `begin` to `end` of a file, in order; texts may be empty.

    Args:
        file: a file of a listing; a .txt must be compressed, or `fields.separator` be set.
        end: end of the range; a compressed file is read whole, so its range must be all of it.
        place: place of the first document to yield; bytes before it are not read if the format allows that.

    Yields:
        (place, document), or (place, problem), after which reading continues.

    Raises:
        BadText: the rest of the range cannot be read.
        InputError: access is refused, or a package for the format is missing.
    """
    format_, compression = format_and_compression(file.name)
    if format_ == ".parquet":
        yield from parquet.read_parquet(file, begin, end, fields, place)
    elif compression:
        assert begin == 0
        with open_text(file, compression) as stream:
            skip_bytes(stream, place)
            if format_ == ".jsonl":
                yield from jsonl.read_jsonl(stream, place, None, fields)
            else:
                yield from text.read_separated(stream, place, None, fields.separator)
    elif format_ == ".jsonl":
        at = place if place >= begin else begin - 1
        with open_file(file, at, end) as stream:
            if place < begin:
                # Skips the rest of the line before; of a very long one, no more than this range.
                at += len(stream.readline(end - at))
            yield from jsonl.read_jsonl(stream, at, end, fields)
    else:
        assert fields.separator is not None
        at = place if place >= begin else text.first_document(file, begin, end, fields.separator)
        if at < end:
            with open_file(file, at, end) as stream:
                yield from text.read_separated(stream, at, end, fields.separator)


def has_separator(file: File, separator: str, size: int) -> bool:
    """True if a line of the first `size` bytes of a .txt, decompressed, is the separator; False if it is damaged."""
    try:
        with open_text(file, format_and_compression(file.name)[1], 0, size) as stream:
            return text.has_separator(stream, separator, size)
    except BadText:
        return False


def line_number(file: File, offset: int) -> int:
    """Returns the number, from 1, of the line that begins at a byte of the text, which is read up to there."""
    with open_text(file, format_and_compression(file.name)[1], 0, offset) as stream:
        return 1 + skip_bytes(stream, offset)


def written_place(file: File, place: int, counts_lines: bool = True) -> str:
    """Formats a document's place for a message, after the file's path; empty for a .txt."""
    format_, compression = format_and_compression(file.name)
    if format_ == ".parquet":
        return f", row {place} (from 0)"
    if format_ == ".txt":
        return ""
    if counts_lines and is_local(file) and place <= COUNTED_BYTES:
        try:
            return f":{line_number(file, place)}"
        except BadText:
            pass  # it has changed, which is the problem itself
    return f", byte {place}" + (" of its text" if compression else "")
