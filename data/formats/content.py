"""What is read: where a document's text is, and what was found there."""

from dataclasses import dataclass
from typing import NamedTuple

from data.errors import BadText


class RawDocument(NamedTuple):
    """A document: its text, which may be empty, and what stands before it."""

    text: str
    prompt: str = ""


# The place of a document, and the document or what is wrong with it.
ReadResult = tuple[int, RawDocument | BadText]


@dataclass(frozen=True)
class Fields:
    """Where a document is found.

    Attributes:
        text: name of its field or column.
        prompt: name of the field or column of what stands before it; none: nothing does.
        separator: the line between two documents of a .txt; none: the file is one document.
    """

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None
