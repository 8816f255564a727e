"""A row of the data as a prompt, at whose end a model answers, and the answer that the corpus has."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids of what stands before the last answer of a document, of that answer, and of what follows it.

    The end of an answer is a part of it, if it is trained on.
    """

    tokens: list[int]
    reference: list[int]
    rest: list[int]


def prompt_of(inputs: np.ndarray, targets: np.ndarray, trained: np.ndarray) -> Prompt | None:
    """Returns the prompt of a document's pairs, [n] each; None where nothing is trained on.

    The last answer of a conversation is the last run of targets that are trained on.
    """
    trained = trained.astype(bool)
    if not trained.any():
        return None
    end = int(np.flatnonzero(trained)[-1]) + 1
    before = np.flatnonzero(~trained[:end])
    begin = int(before[-1]) + 1 if len(before) else 0
    return Prompt(inputs[: begin + 1].tolist(), targets[begin:end].tolist(), targets[end:].tolist())


def length_of(tokens: Sequence[int], end_ids: Collection[int]) -> int:
    """Returns the number of an answer's tokens before the first that ends it."""
    return next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))


def as_in_corpus(prompt: Prompt, answer: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """Returns the inputs of a document whose last answer is this one, which ends as the answer in the corpus does."""
    ending = [*prompt.reference[length_of(prompt.reference, end_ids) :], *prompt.rest]
    document = [*prompt.tokens, *answer[: length_of(answer, end_ids)], *ending]
    # The last token is a target alone.
    return document[:-1]


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], end_ids: Collection[int]) -> str:
    """Returns the text of an answer up to the first token that ends it, without special tokens."""
    return tokenizer.decode(tokens[: length_of(tokens, end_ids)])


def prompt_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Returns the text of a prompt, in which special tokens have their names, but for those before a document."""
    special = {*tokenizer.special_tokens}
    if tokens[: len(tokenizer.bos_ids)] == tokenizer.bos_ids:
        tokens = tokens[len(tokenizer.bos_ids) :]
    pieces = [
        tokenizer.pieces[token].encode() if tokenizer.pieces[token] in special else tokenizer.token_bytes(token)
        for token in tokens
    ]
    return b"".join(pieces).decode(errors="replace")
