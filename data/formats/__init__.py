"""Formats of corpora: how documents are read from a byte range of a file.

Each document has a place, by which it is found again: the byte at which it begins, of a compressed file the byte of its
text, of a .parquet the row.
"""

from collections.abc import Iterator

from data.errors import BadText
from data.files.listing import File, is_local, open_file
from data.formats import jsonl, parquet, separated
from data.formats.compression import COMPRESSIONS, open_text, skip_bytes
from data.formats.content import Fields as Fields
from data.formats.content import RawDocument as RawDocument
from data.formats.content import ReadResult as ReadResult

ENDINGS = (
    ".txt",
    ".jsonl",
    ".parquet",
    *(format_ + end for format_ in (".txt", ".jsonl", ".json") for end in COMPRESSIONS),
)
# A message names the line up to this byte of a local file, which is read for it, and the byte after that.
COUNTED_BYTES = 2**26


def format_and_compression(name: str) -> tuple[str, str]:
    """The format and the compression of a file with this name: (".jsonl", ".gz"), or (".txt", "")."""
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    format_ = "." + name.removesuffix(compression).rpartition(".")[2]
    # What is called .json.gz, as in C4 and Dolma, is JSON Lines.
    return ".jsonl" if format_ == ".json" else format_, compression


def read_documents(file: File, begin: int, end: int, fields: Fields, place: int = 0) -> Iterator[ReadResult]:
    """The documents that begin in stored bytes `begin` to `end` of a file, in order; the texts may be empty.

    Args:
        file: as it was listed; a .txt is compressed, or `fields.separator` is given.
        begin, end: any bytes. A compressed file is read as one: its range must be all of it.
        fields: where the text is.
        place: of the first document that is wanted. What lies before is not read, where the format allows it.

    Yields:
        (place, the document), or (place, what is wrong with it), after which reading goes on.

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
                yield from separated.read_separated(stream, place, None, fields.separator)
    elif format_ == ".jsonl":
        at = place if place >= begin else begin - 1
        with open_file(file, at, end) as stream:
            if place < begin:
                # What is left of the line before; of a very long one, no more than this range.
                at += len(stream.readline(end - at))
            yield from jsonl.read_jsonl(stream, at, end, fields)
    else:
        assert fields.separator is not None
        at = place if place >= begin else separated.first_document(file, begin, end, fields.separator)
        if at < end:
            with open_file(file, at, end) as stream:
                yield from separated.read_separated(stream, at, end, fields.separator)


def line_number(file: File, offset: int) -> int:
    """Of the line that begins at this byte of the text, from 1; the text before it is read."""
    lines = 1
    with open_text(file, format_and_compression(file.name)[1], 0, offset) as stream:
        while offset > 0 and (piece := stream.read(min(offset, 2**20))):
            lines += piece.count(b"\n")
            offset -= len(piece)
    return lines


def written_place(file: File, place: int, counts_lines: bool = True) -> str:
    """A document's place as it follows the file's path in a message; "" for a .txt, whose problems name the byte."""
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
