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
    """The fields that hold a document.

    Attributes:
        text: name of the field or column of the text.
        prompt: name of the field or column of the prompt, or None.
        separator: line between two documents of a .txt; None if the file is one document.
    """

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None
