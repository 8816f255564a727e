"""Documents as they are read from a file."""

import codecs
import importlib
from typing import Any, BinaryIO, NamedTuple

from data.errors import BadText, InputError

# Bytes of the longest document, which is held whole in memory, several times over.
MAX_DOCUMENT_BYTES = 2**30
SKIPPED_BYTES = 2**20
# Characters [begin, end) of each answer of a conversation.
Answers = tuple[tuple[int, int], ...]


class Sequence(NamedTuple):
    """A text, and for a conversation the answers in it that are trained on."""

    text: str
    answers: Answers | None = None


class RawDocument(NamedTuple):
    """A document: its text, which may be empty, its prompt, and for a conversation the answers that are trained on.

    Of a pair, these are the chosen answer; `rejected` is the other one to the same prompt.
    """

    text: str
    prompt: str = ""
    answers: Answers | None = None
    rejected: Sequence | None = None


# The place of a document, and the document or the problem with it.
ReadResult = tuple[int, RawDocument | BadText]


def read_line(stream: BinaryIO, number: int) -> tuple[bytes, int]:
    """Returns a line and its length. Of a line longer than a document may be, it returns only the beginning.

    Args:
        number: byte of the text at which the line begins; a byte-order mark at 0 is left out.
    """
    line = stream.readline(MAX_DOCUMENT_BYTES + 1)
    length = len(line)
    if length > MAX_DOCUMENT_BYTES:
        rest = line
        while not rest.endswith(b"\n") and (rest := stream.readline(SKIPPED_BYTES)):
            length += len(rest)
    return line if number else line.removeprefix(codecs.BOM_UTF8), length


def too_long() -> BadText:
    """Returns the problem with a document of more than `MAX_DOCUMENT_BYTES`."""
    return BadText(f"is longer than {MAX_DOCUMENT_BYTES / 2**20:,.0f} MiB, the most of one document")


def import_reader(name: str, ending: str, install: str) -> Any:
    """Imports an optional package that reads files with an ending. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(f"a package is missing that reads {ending}: pip install {install}") from None
