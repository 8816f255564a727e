"""The interface of a tokenizer: text to token ids and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

# Ends a document and precedes the next. Inside a document it is ordinary text.
END_OF_TEXT = "<|endoftext|>"
# Mark prefix, suffix and middle of a document that is filled in the middle, in tokenizers of ours and Qwen's.
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MODEL_FILE = "tokenizer.model"
# The file of tokenizers of other projects.
JSON_FILE = "tokenizer.json"
# The template that writes conversations, next to the tokenizer.
TEMPLATE_FILE = "chat_template.jinja"
UNKNOWN = "<unk>"
SPACE = "\u2581"
# Piece by text that is escaped. U+E000 is in the private use area.
ESCAPES = {"\ue000": "\ue0000", SPACE: "\ue0001"}
UNESCAPED = {piece: text for text, piece in ESCAPES.items()}


def plain_text(piece: str) -> str:
    """Returns the text of one of our pieces as it appears in a document."""
    return UNESCAPED.get(piece, piece.replace(SPACE, " "))


def merge_pairs(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that forms a piece, in the order of the pieces: SentencePiece merges all of them."""
    known = dict.fromkeys(pieces)
    pairs = ((piece[:cut], piece[cut:]) for piece in known for cut in range(1, len(piece)))
    return [(one, other) for one, other in pairs if one in known and other in known]


class Tokenizer(ABC):
    """A tokenizer, in memory.

    Attributes:
        folder: folder that it was read from.
        eos_id: id of the token that ends a document.
        generation_config: what the makers of the weights say of generation, which exports keep.
        bos_ids: ids of the tokens before a document, at least one: the tokenizer's own, or else `eos_id`.
        fingerprint: SHA-256 (hex) of everything that its ids follow from.
        pieces: the text of each id as its file writes it.
        fim_tokens: the added tokens that mark prefix, suffix and middle, if it has any that are known.
        adds_space: true if a text is encoded as if a space preceded it; never for our own.
        chat_template: the template of conversations that its folder holds.
        named_tokens: names that a template has for tokens, such as "bos_token", and the tokens.
    """

    folder: Path
    vocab_size: int
    eos_id: int
    bos_ids: list[int]
    fingerprint: str
    pieces: list[str]
    fim_tokens: tuple[str, str, str] | None = None
    adds_space: bool = False
    generation_config: Mapping[str, Any] = MappingProxyType({})
    chat_template: str | None = None
    named_tokens: Mapping[str, str] = MappingProxyType({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})

    @property
    def stop_ids(self) -> list[int]:
        """The ids at which generation ends: `eos_id`, and those that `generation_config` adds."""
        named = self.generation_config.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        return [self.eos_id, *(i for i in named if type(i) is int and i != self.eos_id)]

    @property
    def added_tokens(self) -> set[str]:
        """The tokens that no pieces are merged to: a mark has no meaning of its own in a text."""
        kinds = zip(self.pieces, self.token_kinds, strict=True)
        return {piece for piece, kind in kinds if kind in ("control", "whole")}

    @property
    def special_tokens(self) -> list[str]:
        """The tokens that `encode` never finds in a text, and `encode_marked` does."""
        kinds = zip(self.pieces, self.token_kinds, strict=True)
        return [piece for piece, kind in kinds if kind in ("control", "unknown")]

    def fim_ids(self) -> tuple[int, int, int] | None:
        """Returns the ids of `fim_tokens`, or None without them."""
        if self.fim_tokens is None:
            return None
        prefix, suffix, middle = map(self.pieces.index, self.fim_tokens)
        return prefix, suffix, middle

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Returns the files that recreate the tokenizer in another folder, by name; the identifying one comes last."""

    def encode_with_bos(self, text: str) -> list[int]:
        """Returns `bos_ids` and the ids of a text, as a model sees the beginning of a document."""
        return [*self.bos_ids, *self.encode(text).tolist()]

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns token ids, int32 [n], possibly read-only, without special tokens. ValueError for lone surrogates."""

    @abstractmethod
    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text in which the names of special tokens are those tokens, and their characters.

        Returns:
            ids, int32 [n], and for each the characters [begin, end), int64 [n, 2]; tokens that share a character
            have it both.
        """

    def encode_all(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each text, lazily and in order."""
        return map(self.encode, texts)

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        """Returns the ids of each of some `parts`; other Python threads run meanwhile."""
        return [self.encode(part) for part in parts]

    def parts(self, text: str) -> Iterator[str]:
        """Yields the parts of a text that can be encoded independently; by default the whole text."""
        yield text

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, with U+FFFD for incomplete characters. IndexError for an unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token, possibly a part of a character; none for a token without text."""
        if token < 0:
            raise IndexError(f"there is no token {token}")
        return self._bytes[token]

    @cached_property
    @abstractmethod
    def _bytes(self) -> list[bytes]:
        """The bytes of each id."""

    @cached_property
    @abstractmethod
    def token_kinds(self) -> list[str]:
        """Returns the kind of each id: unknown, control, byte, whole (never merged further), piece, or unused."""
