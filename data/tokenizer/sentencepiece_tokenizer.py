"""The project's own tokenizer: lossless SentencePiece BPE (Kudo and Richardson 2018, arXiv:1808.06226).

Characters without a piece fall back to bytes, and nothing is normalized. SentencePiece writes a space as U+2581, so a
real U+2581 would come back as a space: it is escaped, like the escape itself, by pieces of their own. Runs of spaces
and line ends that are frequent in the sample (a program's indentation) are pieces, too.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data.files.json_file import read_small_file
from data.tokenizer.tokenizer import (
    END_OF_TEXT,
    ESCAPES,
    FIM_TOKENS,
    MODEL_FILE,
    SPACE,
    TEMPLATE_FILE,
    Tokenizer,
    plain_text,
)

log = logging.getLogger("ziggurat")
# SentencePiece's time for a text grows a little faster than its length, its memory by 50 bytes a character. So a text
# is encoded in parts of a little more than PART_CHARACTERS, and of MAX_PART_CHARACTERS at most.
PART_CHARACTERS = 1024
MAX_PART_CHARACTERS = 2**20


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from the bytes of its model file. Raises RuntimeError or ValueError if they are not one."""

    def __init__(self, folder: Path, model: bytes):
        self.folder = folder
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        self.vocab_size = self._model.GetPieceSize()
        self.pieces = [self._model.IdToPiece(i) for i in range(self.vocab_size)]
        if not {END_OF_TEXT, *ESCAPES.values()} <= set(self.pieces):
            raise ValueError("a SentencePiece model, but not ours")
        self.eos_id = self.pieces.index(END_OF_TEXT)
        self.bos_ids = [self.eos_id]
        self.fim_tokens = FIM_TOKENS if {*FIM_TOKENS} <= self.added_tokens else None
        if (template := folder / TEMPLATE_FILE).is_file():
            self.chat_template = read_small_file(template).decode(errors="replace")

    def scores(self) -> list[float]:
        """The score of each id; of all pairs that form a piece, the one with the highest score is merged first."""
        return [self._model.GetScore(i) for i in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        template = {} if self.chat_template is None else {TEMPLATE_FILE: self.chat_template.encode()}
        return template | {MODEL_FILE: (self.folder / MODEL_FILE).read_bytes()}

    def encode(self, text: str) -> np.ndarray:
        ids = [self._model.EncodeAsNumpy(escaped(part).encode()) for part in self.parts(text)]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def encode_parts(self, parts: list[str]) -> list[np.ndarray]:
        # A single call, which takes Python's global lock once.
        return self._model.EncodeAsNumpy([escaped(part).encode() for part in parts], num_threads=1)

    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids, spans, at = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)], 0
        for i, part in enumerate(self._marks.split(text)):
            # Marks are every other part.
            of_part = np.array([self.pieces.index(part)], np.int32) if i % 2 else self.encode(part)
            ids.append(of_part)
            spans.append(np.array([[at, at + len(part)]]) if i % 2 else at + self._characters(part, of_part))
            at += len(part)
        return np.concatenate(ids), np.concatenate(spans)

    def _characters(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Returns the characters [begin, end) of each token of a text, int64 [n, 2]."""
        ends = np.cumsum([len(self.token_bytes(token)) for token in ids.tolist()], dtype=np.int64)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        of_byte = np.repeat(np.arange(len(text)), sizes)
        begins = np.concatenate([[0], ends[:-1]])[: len(ends)]
        return np.stack([of_byte[begins], of_byte[ends - 1] + 1], axis=1)

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})")

    def parts(self, text: str) -> Iterator[str]:
        """Yields the parts of a text that are encoded independently; at least one.

        A cut is made between two characters that are adjacent in no piece: the text on both sides is then never
        merged, so the ids are those of the whole text. A text without such a place for `MAX_PART_CHARACTERS`
        characters (a run of one letter) is cut there all the same, and still decodes to itself.
        """
        start = 0
        while True:
            stop = min(len(text), start + MAX_PART_CHARACTERS)
            cuts = (i for i in range(start + PART_CHARACTERS, stop) if text[i - 1 : i + 1] not in self._neighbours)
            end = next(cuts, stop)
            yield text[start:end]
            if end == len(text):
                return
            start = end

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """All pairs of characters that are adjacent in some piece."""
        pieces = (piece.replace(SPACE, " ") for piece in self.pieces)
        return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))

    @cached_property
    def _bytes(self) -> list[bytes]:
        def of_piece(i: int, piece: str) -> bytes:
            if self._model.IsByte(i):
                return bytes.fromhex(piece[3:5])
            if self._model.IsControl(i):
                return b""
            return plain_text(piece).encode()

        return [of_piece(i, piece) for i, piece in enumerate(self.pieces)]

    @cached_property
    def token_kinds(self) -> list[str]:
        # The trainer puts user-defined symbols before the bytes; a run of line ends may also be learned.
        first_byte = self.pieces.index("<0x00>")
        return [
            "unknown" if self._model.IsUnknown(i)
            else "control" if self._model.IsControl(i)
            else "byte" if self._model.IsByte(i)
            else "whole" if i < first_byte
            else "piece"
            for i in range(self.vocab_size)
        ]  # fmt: skip


def escaped(text: str) -> str:
    """Returns a text as the trainer and the model read it."""
    for plain, piece in ESCAPES.items():
        text = text.replace(plain, piece)
    return text
