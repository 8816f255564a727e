"""Pairs: two answers to one prompt, of which the first was preferred."""

from typing import Any

from data.errors import BadText
from data.formats.content import RawDocument, Sequence
from data.formats.conversation import ANSWERER, Conversations

# The field or column of an answer, and its value.
Answer = tuple[str, Any]
SAME = "are the same, which prefers neither"


def text_pair(prompt: str, chosen: Answer, rejected: Answer) -> RawDocument:
    """Returns the pair of two texts that continue a prompt. Raises BadText if one is empty, or both are the same."""
    for name, text in (chosen, rejected):
        if not text.strip():
            raise BadText(f"field {name!r} is an empty answer")
    if chosen[1] == rejected[1]:
        raise BadText(f"fields {chosen[0]!r} and {rejected[0]!r} {SAME}")
    return RawDocument(chosen[1], prompt, rejected=Sequence(rejected[1]))


def conversation_pair(
    conversations: Conversations, prompt: Answer | None, chosen: Answer, rejected: Answer
) -> RawDocument:
    """Returns the pair of two conversations that differ in their last answers, on which alone is trained.

    Args:
        prompt: turns that precede those of both answers, or a text, which is one turn of the user.
        chosen: the turns that follow the prompt, or a text, which is one turn of the assistant.

    Raises:
        BadText: as `Conversations.document`; a conversation does not end with an answer; or other turns differ, too.
    """
    before = [] if prompt is None else _turns(prompt, "user")
    both = [conversations.checked(before + _turns(answer, ANSWERER), answer[0]) for answer in (chosen, rejected)]
    for messages, (name, _) in zip(both, (chosen, rejected), strict=True):
        if messages[-1]["role"] != ANSWERER:
            raise BadText(f"field {name!r} ends with a turn of {messages[-1]['role']!r:.40} and not of the {ANSWERER}")
    one, other = both
    if one[:-1] != other[:-1]:
        turn = next(
            (i for i, turns in enumerate(zip(one, other, strict=False), start=1) if turns[0] != turns[1]), len(one)
        )
        raise BadText(
            f"turn {turn} of {chosen[0]!r} is not that of {rejected[0]!r}; the answers of a pair follow the same turns"
        )
    first, second = (
        conversations.written(turns, answer[0]) for turns, answer in zip(both, (chosen, rejected), strict=True)
    )
    if first.text == second.text:
        raise BadText(f"the answers in {chosen[0]!r} and {rejected[0]!r} {SAME}")
    return first._replace(rejected=Sequence(second.text, second.answers))


def _turns(value: Answer, role: str) -> list[Any]:
    name, turns = value
    if isinstance(turns, str):
        return [{"role": role, "content": turns}]
    if not isinstance(turns, list):
        raise BadText(f"field {name!r} is no list of turns and no text but {type(turns).__name__}")
    return turns
