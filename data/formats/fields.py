"""The names of the fields that hold documents."""

from dataclasses import dataclass

from data.formats.conversation import Conversations


@dataclass(frozen=True)
class Fields:
    """The fields or columns that hold a document's text and prompt, and the line between two documents of a .txt.

    With `conversations`, each document is one of those, and the fields of a text are not read.
    """

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None
    conversations: Conversations | None = None
