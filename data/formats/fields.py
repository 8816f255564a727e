"""The names of the fields that hold documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.formats.content import RawDocument
from data.formats.conversation import Conversations
from data.formats.pairs import conversation_pair, text_pair


@dataclass(frozen=True)
class Fields:
    """The fields or columns that hold a document's text and prompt, and the line between two documents of a .txt.

    With `conversations`, each document is one of those, and the field of a text is not read. With `rejected`, it is a
    pair, whose chosen answer is the text or the conversation.
    """

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None
    conversations: Conversations | None = None
    rejected: str | None = None

    @property
    def columns(self) -> dict[str, str]:
        """The setting that names each field that is read, by field."""
        first = self.conversations.field if self.conversations else self.text
        named = {first: "data.messages_field" if self.conversations else "data.text_field"}
        others = {self.prompt: "data.prompt_field", self.rejected: "data.rejected_field"}
        return named | {name: setting for name, setting in others.items() if name is not None and name not in named}

    def document(self, values: Mapping[str, Any]) -> RawDocument:
        """Returns the document of a record, given its `columns`; texts unless there are `conversations`.

        Raises:
            BadText: the turns are none that the template can write, or the answers of a pair cannot be compared.
        """
        if self.conversations:
            chosen = (self.conversations.field, values[self.conversations.field])
            if self.rejected is None:
                return self.conversations.document(chosen[1])
            prompt = None if self.prompt is None else (self.prompt, values[self.prompt])
            return conversation_pair(self.conversations, prompt, chosen, (self.rejected, values[self.rejected]))
        text, before = values[self.text], "" if self.prompt is None else values[self.prompt]
        if self.rejected is None:
            return RawDocument(text, before)
        return text_pair(before, (self.text, text), (self.rejected, values[self.rejected]))
