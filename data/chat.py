"""Chats: the prompts after which a model answers, and how much of a conversation they hold.

A prompt is the text that the chat template writes of the turns so far, up to where the next answer begins, and its ids
are those of Transformers' `apply_chat_template(..., add_generation_prompt=True)`.
"""

import bisect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data.config import DataConfig
from data.conversations import EXAMPLE, open_template, tokens_that_end
from data.errors import BadText, InputError
from data.formats import Conversations
from data.formats.conversation import ANSWERER
from data.tokenizer.tokenizer import Tokenizer

FIELD = "messages"


class Prompts:
    """The prompts of conversations.

    Args:
        tokenizer: the one that the model was trained with.
        template_file: a file with a Jinja template; None for the one that the tokenizer has.

    Attributes:
        end_ids: the special tokens with which the template ends an answer.
        marks: names of special tokens; an answer that held one as text would have the token in the next prompt.

    Raises:
        InputError: there is no template, or it renders no question.
    """

    def __init__(self, tokenizer: Tokenizer, template_file: str | None = None):
        if template_file is None and tokenizer.chat_template is None:
            raise InputError(
                f"the tokenizer of {tokenizer.folder} has no chat template; take a model that was trained on "
                "conversations, name a Jinja file with `ziggurat chat --template`, or continue plain text with "
                "`ziggurat generate --prompt`"
            )
        template = open_template(DataConfig(messages_field=FIELD, chat_template=template_file), tokenizer)
        assert template is not None
        try:
            prompt = template.render(EXAMPLE[:1], prompts=True)
            written = prompt + template.render(EXAMPLE)
        except BadText as error:
            raise InputError(f"{error}; take another template") from None
        if EXAMPLE[0]["content"] not in prompt:
            raise InputError(f"the chat template of {template.name} does not write the question; take another template")
        self.end_ids: list[int] = []
        # A template with which no answer can be trained on (DeepSeek R1's) may still be chatted with: the weights'
        # generation_config.json names where it ends.
        with suppress(InputError):
            self.end_ids = tokens_that_end(template, tokenizer)
        self.marks = template.marks
        # Some templates begin turns with added tokens that are not special (DeepSeek's <｜User｜>).
        self._marks = {name for name in tokenizer.added_tokens if name in template.marks or name in written}
        self._tokenizer = tokenizer
        self._conversations = Conversations(FIELD, template)

    def ids(self, messages: Any) -> list[int]:
        """Returns the ids of a conversation's turns up to where the next answer begins.

        Raises:
            BadText: there are no turns that can be answered, one holds a mark, or the template does not render them.
        """
        prompt = self._conversations.prompt(messages)
        for number, message in enumerate(messages, 1):
            if message["role"] != ANSWERER and (mark := self.mark_in(message["content"])):
                raise BadText(f"turn {number} holds {mark!r}, which the tokenizer reads as a mark of its own")
        ids, _ = self._tokenizer.encode_marked(prompt)
        return ids.tolist()

    def mark_in(self, text: str) -> str | None:
        """Returns a mark that a prompt with this text would have from it, and that could end its turn; or None."""
        named = [mark for mark in self.marks if mark in text]
        # A normalizer may make a mark of another text.
        ids, _ = self._tokenizer.encode_marked(text)
        read = [self._tokenizer.pieces[token] for token in ids.tolist()]
        return next((mark for mark in [*named, *read] if mark in named or mark in self._marks), None)


@dataclass
class Turn:
    """A question, and the newest attempt at its answer, which is empty where there is none."""

    question: str
    answer: str = ""
    attempt: int = 0


class Chat:
    """A conversation with a model, which sees as many of its newest turns as the context has room for.

    Args:
        context: positions that the model sees at most.
        room: positions of the context that earlier turns leave to the answer.
        system: text of the system's turn, which is always seen; None for none.

    Attributes:
        turns: all turns; those without an answer are in no prompt but their own.
        num_left_out: number of the oldest turns with an answer that the last prompt lacks.

    Raises:
        InputError: the system's text holds a mark or is too long, or the template has no such turn.
    """

    def __init__(self, prompts: Prompts, context: int, room: int, system: str | None = None):
        self._prompts, self._context, self._room = prompts, context, room
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[Turn] = []
        self.num_left_out = 0
        if system is not None:
            self._refuse_mark("--system", system)
            if (length := len(self._prompt_ids([], "a"))) >= context:
                raise InputError(
                    f"--system is too long: with a question of one letter it has {length:,} tokens, and the model sees "
                    f"{context:,}; shorten it"
                )

    def ask(self, question: str) -> list[int]:
        """Adds a question, and returns the ids after which it is answered.

        Raises:
            InputError: it holds a mark, or is too long; then it is not added.
        """
        self._refuse_mark("the question", question)
        ids = self._fitting(question, self._answered(self.turns))
        self.turns.append(Turn(question))
        return ids

    def ask_again(self) -> list[int]:
        """Forgets the last question's answer, and returns the ids after which it is answered. InputError if none is."""
        if not self.turns:
            raise InputError("there is no question yet that could be answered once more; ask one")
        *past, last = self.turns
        ids = self._fitting(last.question, self._answered(past))
        last.answer, last.attempt = "", last.attempt + 1
        return ids

    def clear(self) -> None:
        """Forgets all turns but the system's."""
        self.turns, self.num_left_out = [], 0

    def messages(self) -> list[dict[str, str]]:
        """Returns the whole conversation as a list of messages, without questions that have no answer."""
        return self._messages(self._answered(self.turns))

    def _answered(self, turns: list[Turn]) -> list[Turn]:
        return [turn for turn in turns if turn.answer.strip()]

    def _messages(self, turns: list[Turn]) -> list[dict[str, str]]:
        messages = [*self._system]
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": ANSWERER, "content": turn.answer}]
        return messages

    def _fitting(self, question: str, past: list[Turn]) -> list[int]:
        """Returns the ids of the prompt with the most turns that fit, and notes how many it lacks."""
        alone = len(self._prompt_ids([], question))
        if alone >= self._context:
            raise InputError(
                f"the question is too long: it has {alone:,} tokens, with the template's marks"
                f"{' and the turn of the system' if self._system else ''}, and the model sees {self._context:,}, of "
                "which the answer needs one; shorten it"
            )
        fits = lambda first: len(self._prompt_ids(past[first:], question)) <= self._context - self._room
        self.num_left_out = bisect.bisect_left(range(len(past)), True, key=fits)
        return self._prompt_ids(past[self.num_left_out :], question)

    def _prompt_ids(self, past: list[Turn], question: str) -> list[int]:
        try:
            return self._prompts.ids([*self._messages(past), {"role": "user", "content": question}])
        except BadText as error:
            raise InputError(str(error)) from None

    def _refuse_mark(self, what: str, text: str) -> None:
        if mark := self._prompts.mark_in(text):
            raise InputError(f"{what} holds {mark!r}, which the tokenizer reads as a mark of its own; take it out")
