"""A row of the data as a prompt, at whose end a model answers, and the answer that the corpus has."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """Token ids of what stands before the last answer of a document, and of that answer, its end included."""

    tokens: list[int]
    reference: list[int]


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
    return Prompt(inputs[: begin + 1].tolist(), targets[begin:end].tolist())


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], end_ids: Collection[int]) -> str:
    """Returns the text of an answer up to the first token that ends it, without special tokens."""
    end = next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tokenizer.decode(tokens[:end])


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
