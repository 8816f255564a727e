"""Documents as they are read from a file, and the names of the fields that hold them."""

from dataclasses import dataclass
from typing import NamedTuple

from data.errors import BadText


class RawDocument(NamedTuple):
    """A document: its text, which may be empty, and its prompt."""

    text: str
    prompt: str = ""


# The place of a document, and the document or the problem with it.
ReadResult = tuple[int, RawDocument | BadText]


@dataclass(frozen=True)
class Fields:
    """The fields or columns that hold a document's text and prompt, and the line between two documents of a .txt."""

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None
