"""The interface of a tokenizer: text to token ids and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

# Ends a document, and stands before the next. As text in a document it is ordinary text.
END_OF_TEXT = "<|endoftext|>"
MODEL_FILE = "tokenizer.model"
# Of other people's.
JSON_FILE = "tokenizer.json"
SPACE = "\u2581"
# Text → the piece that stands for it. U+E000 is of the private use area.
ESCAPES = {"\ue000": "\ue0000", SPACE: "\ue0001"}


class Tokenizer(ABC):
    """A tokenizer, in memory.

    Attributes:
        folder: where it was read.
        vocab_size: number of token ids.
        eos_id: of the token that ends a document.
        bos_id: of the token that stands before one: what the tokenizer itself puts there, or else `eos_id`.
        fingerprint: SHA-256 (hex) of what its ids follow from.
        pieces: the text that each id stands for as its file writes it.
        adds_space: a text is read as if a space stood before it. Never by ours.
    """

    folder: Path
    vocab_size: int
    eos_id: int
    bos_id: int
    fingerprint: str
    pieces: list[str]
    adds_space: bool = False

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What makes the same tokenizer in another folder, by name; the file that it is known by comes last."""

    def encode_with_bos(self, text: str) -> list[int]:
        """`bos_id` and the ids of a text: what a model sees where a document begins."""
        return [self.bos_id, *self.encode(text).tolist()]

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [n], which may be read-only; nothing is added. ValueError where it has lone surrogates."""

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, lazily and in order."""
        return map(self.encode, texts)

    def parts(self, text: str) -> Iterator[str]:
        """The text cut into what can be encoded apart from each other: here, not at all."""
        yield text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; of characters cut in the middle, U+FFFD. IndexError where there is no such id."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, which may be a part of a character; of one that is no text none."""
        if token < 0:
            raise IndexError(f"there is no token {token}")
        return self._bytes[token]

    @cached_property
    @abstractmethod
    def _bytes(self) -> list[bytes]:
        """Of each id."""

    @cached_property
    @abstractmethod
    def token_kinds(self) -> list[str]:
        """Of each id: unknown, control, byte, whole (never part of a longer piece), piece, or unused."""
