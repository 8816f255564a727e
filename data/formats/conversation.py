"""Conversations: lists of turns, which a chat template writes as one text, and the parts of it that are trained on.

An answer is trained on from where generation begins, after the header of the assistant's turn, to the mark at which it
stops. No pattern of any template is known here. With the text of the whole conversation, W, of the turns before an
answer with the prompt for it, P, and of the turns up to the answer, R,

    W = P answer rest,   R = P answer

must hold, so that a model sees in training what it will see when it answers, and is trained on what it should write
then. A template that writes the past otherwise once more turns follow (Qwen3's leaves earlier thoughts out) breaks one
of them, and the conversation is refused: a mask could be wrong.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data.errors import BadText
from data.formats.content import RawDocument
from data.printable import printable_name

if TYPE_CHECKING:
    from data.formats.template import ChatTemplate

ANSWERER = "assistant"
Messages = list[dict[str, Any]]


class Conversations:
    """The conversations of one corpus.

    Args:
        field: field or column that holds the turns.
        template: writes them as text.
        last_only: true if only the last answer of each is trained on.
    """

    def __init__(self, field: str, template: "ChatTemplate", last_only: bool = False):
        self.field, self.template, self._last_only = field, template, last_only

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self.template.marks))) if self.template.marks else None

    def document(self, value: Any) -> RawDocument:
        """Returns the text of some turns, with the characters of the answers that are trained on.

        Raises:
            BadText: there is no such conversation, the template does not render it, or W, P and R do not fit.
        """
        return self.written(self.checked(value, self.field), self.field)

    def written(self, messages: Messages, field: str) -> RawDocument:
        """Returns the document of turns of a field that have been `checked`. Raises BadText as `document` does."""
        whole = self.template.render(messages)
        _refuse_half_characters(whole, field)
        answers = [i for i, message in enumerate(messages) if message["role"] == ANSWERER]
        trained = answers[-1:] if self._last_only else answers
        return RawDocument(whole, answers=tuple(self._span(messages, i, whole) for i in trained))

    def prompt(self, value: Any) -> str:
        """Returns the text of some turns up to where the next answer begins.

        Raises:
            BadText: there is no such conversation, it ends with an answer, or the template does not render it.
        """
        messages = self._turns(value, self.field)
        if not messages or messages[-1]["role"] == ANSWERER:
            raise BadText(f"field {self.field!r} does not end with a turn that the {ANSWERER} can answer")
        prompt = self.template.render(messages, prompts=True)
        _refuse_half_characters(prompt, self.field)
        return prompt

    def texts(self, text: str) -> Iterable[str]:
        """Returns the parts of a rendered conversation between its marks."""
        return self._marks.split(text) if self._marks else [text]

    def _span(self, messages: Messages, i: int, whole: str) -> tuple[int, int]:
        """Returns the characters [begin, end) of the answer in turn i."""
        turn = f"turn {i + 1}: the chat template of {self.template.name}"
        last = "; " + ("" if self._last_only else "train on the last answers alone (data.train_on=last), or ")
        last += "take another template"
        try:
            prompt = self.template.render(messages[:i], prompts=True)
        except BadText as error:
            raise BadText(f"turn {i + 1}: the turns before this answer: {error}") from None
        if not whole.startswith(prompt):
            raise BadText(f"{turn} writes the turns before this answer otherwise once it is there{last}")
        until = whole if i == len(messages) - 1 else self._until(messages[: i + 1], whole)
        if until is None or len(until) < len(prompt):
            raise BadText(f"{turn} writes this answer otherwise once other turns follow it{last}")
        answer = until[len(prompt) :]
        if _letters(messages[i]["content"]) not in _letters(answer):
            raise BadText(f"{turn} leaves out a part of this answer; take another template")
        # Whitespace after the mark at which generation stops is never generated.
        end = len(answer.rstrip()) if self._ends_with_mark(answer) else len(answer)
        return len(prompt), len(prompt) + end

    def _until(self, messages: Messages, whole: str) -> str | None:
        """Returns the text of the turns up to an answer, if the whole conversation begins with it.

        Phi-3's template ends every conversation with one mark more, which moves on as turns are added.
        """
        until = self.template.render(messages)
        if whole.startswith(until):
            return until
        for mark in self.template.marks:
            shorter = until.removesuffix(mark)
            if (
                until != shorter
                and whole.endswith(mark)
                and whole.startswith(shorter)
                and self._ends_with_mark(shorter)
            ):
                return shorter
        return None

    def _ends_with_mark(self, text: str) -> bool:
        return text.rstrip().endswith(tuple(self.template.marks))

    def checked(self, value: Any, field: str) -> Messages:
        """Returns the turns of a field without fields that are null, as a Parquet file has them for all turns.

        Raises:
            BadText: they are no turns, an answer is empty, there is none, or one holds a mark of the tokenizer.
        """
        messages = self._turns(value, field)
        if not any(message["role"] == ANSWERER for message in messages):
            raise BadText(f"field {field!r} has no turn of the {ANSWERER}, so nothing to train on")
        return messages

    def _turns(self, value: Any, field: str) -> Messages:
        """Returns the same of turns among which there may be no answer."""
        if not isinstance(value, list):
            raise BadText(f"field {field!r} is no list of turns but {type(value).__name__}; see data.messages_field")
        messages = []
        for number, turn in enumerate(value, start=1):
            if not isinstance(turn, Mapping):
                raise BadText(f"turn {number} is no object but {type(turn).__name__}")
            message = {name: field for name, field in turn.items() if field is not None}
            for name in ("role", "content"):
                if not isinstance(message.get(name), str) or not (message[name] or name == "content"):
                    has = (
                        f"{message[name]!r:.40}"
                        if name in message
                        else f"only {printable_name(', '.join(map(str, message))[:200])}"
                    )
                    raise BadText(f"turn {number} has no {name} that is a text, {has}")
            if message["role"] == ANSWERER and not message["content"].strip():
                raise BadText(f"turn {number} is an empty answer")
            if self._marks and (mark := next((m for text in _texts(message) if (m := self._marks.search(text))), None)):
                raise BadText(
                    f"turn {number} holds {mark[0]!r}, which the tokenizer reads as a mark of its own; take it out"
                )
            messages.append(message)
        return messages


def _refuse_half_characters(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"field {field!r} has half a character: {text[error.start]!r}") from None


def _texts(value: Any) -> Iterable[str]:
    """Yields every text in a message, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            yield from _texts(part)


def _letters(text: str) -> str:
    """Returns a text without whitespace, which templates take away and add."""
    return "".join(text.split())
