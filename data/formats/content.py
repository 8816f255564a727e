"""Documents as they are read from a file, and the names of the fields that hold them."""

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.errors import BadText, InputError


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


def import_reader(name: str, ending: str, install: str) -> Any:
    """Imports an optional package that reads files with an ending. Raises InputError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise InputError(f"a package is missing that reads {ending}: pip install {install}") from None
