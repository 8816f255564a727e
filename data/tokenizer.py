"""Text to token ids and back. Ours is SentencePiece BPE (Kudo and Richardson 2018, arXiv:1808.06226), losing nothing.

What the pieces of the vocabulary don't cover falls back to bytes, and nothing is normalized. SentencePiece writes a
space as U+2581, so a real U+2581 would come back as a space: it is escaped, as is the escape, by pieces of their own.
Runs of spaces and line ends that the sample holds often (a program's indentation) are pieces too.

Other people's tokenizers are in `data.huggingface_tokenizer`.
"""

import collections
import hashlib
import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data.errors import InputError

log = logging.getLogger("ziggurat")

# Ends a document, and stands before the next. As text in a document it is ordinary text.
END_OF_TEXT = "<|endoftext|>"
MODEL_FILE = "tokenizer.model"
# Of other people's.
JSON_FILE = "tokenizer.json"
SPACE = "\u2581"
# Text → the piece that stands for it. U+E000 is of the private use area.
ESCAPES = {"\ue000": "\ue0000", SPACE: "\ue0001"}
# One piece of whitespace for so many pieces of the vocabulary.
PIECES_PER_WHITESPACE = 64
CHARACTER_COVERAGE = 0.9995
# SentencePiece's time for a text grows a little faster than its length, its memory by 50 bytes a character. So a text
# is encoded in parts of a little more than PART characters, and of LONGEST_PART at most.
PART = 1024
LONGEST_PART = 2**20


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

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read the tokenizer of a folder: ours, or else the one in its `tokenizer.json`.

        Raises:
            InputError: there is none, or it is damaged or of another kind.
        """
        own = folder / MODEL_FILE
        if own.is_file():
            try:
                return SentencePieceTokenizer(folder, own.read_bytes())
            except (RuntimeError, ValueError):
                if not (folder / JSON_FILE).is_file():
                    raise InputError(
                        f"{own} is damaged, or not made by `ziggurat tokenize`; restore it, or put the {JSON_FILE} of "
                        "its makers beside it"
                    ) from None
        if (folder / JSON_FILE).is_file():
            from data.huggingface_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer(folder)
        raise InputError(
            f"{folder} holds no tokenizer ({MODEL_FILE} or {JSON_FILE}); make one with `ziggurat tokenize`"
        )

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What makes the same tokenizer in another folder, by name; the file that it is known by comes last."""

    def begin(self, text: str) -> list[int]:
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
    def kinds(self) -> list[str]:
        """Of each id: unknown, control, byte, whole (never part of a longer piece), piece, or unused."""


class SentencePieceTokenizer(Tokenizer):
    """Ours, from the bytes of its file. RuntimeError or ValueError where they are no such file's."""

    def __init__(self, folder: Path, model: bytes):
        self.folder = folder
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        self.vocab_size = self._model.GetPieceSize()
        self.pieces = [self._model.IdToPiece(i) for i in range(self.vocab_size)]
        if not {END_OF_TEXT, *ESCAPES.values()} <= set(self.pieces):
            raise ValueError("a SentencePiece model, but not ours")
        self.eos_id = self.bos_id = self.pieces.index(END_OF_TEXT)

    def scores(self) -> list[float]:
        """Of each id: of all pairs that make a piece, the one of the highest score is joined first."""
        return [self._model.GetScore(i) for i in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        """`tokenizer.model`."""
        return {MODEL_FILE: (self.folder / MODEL_FILE).read_bytes()}

    def encode(self, text: str) -> np.ndarray:
        """Those of the whole text, found in parts."""
        found = [self._encode(part) for part in self.parts(text)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def parts(self, text: str) -> Iterator[str]:
        """The text cut into what is encoded at once: at least one part, and those of a part are the part itself.

        A cut is made between two characters that no piece has side by side: what is left of it and what is right of
        it are then never joined, so the ids are those of the whole text. A text without such a place for
        `LONGEST_PART` characters (a run of one letter) is cut there all the same, and still comes back.
        """
        start = 0
        while True:
            stop = min(len(text), start + LONGEST_PART)
            cuts = (i for i in range(start + PART, stop) if text[i - 1 : i + 1] not in self._neighbours)
            end = next(cuts, stop)
            yield text[start:end]
            if end == len(text):
                return
            start = end

    def _encode(self, part: str) -> np.ndarray:
        for plain, escaped in ESCAPES.items():
            if plain in part:
                part = part.replace(plain, escaped)
        return self._model.EncodeAsNumpy(part.encode())

    @cached_property
    def _neighbours(self) -> frozenset[str]:
        """Every two characters that stand side by side in a piece."""
        pieces = (piece.replace(SPACE, " ") for piece in self.pieces)
        return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))

    @cached_property
    def _bytes(self) -> list[bytes]:
        escaped = {piece: plain for plain, piece in ESCAPES.items()}

        def of_piece(i: int, piece: str) -> bytes:
            if self._model.IsByte(i):
                return bytes([int(piece[3:5], 16)])
            if self._model.IsControl(i):
                return b""
            return escaped.get(piece, piece.replace(SPACE, " ")).encode()

        return [of_piece(i, piece) for i, piece in enumerate(self.pieces)]

    @cached_property
    def kinds(self) -> list[str]:
        """Of each id."""
        # The trainer puts what it was told to keep whole before the bytes; a run of line ends may also be learned.
        first_byte = self.pieces.index("<0x00>")
        return [
            "unknown" if self._model.IsUnknown(i)
            else "control" if self._model.IsControl(i)
            else "byte" if self._model.IsByte(i)
            else "whole" if i < first_byte
            else "piece"
            for i in range(self.vocab_size)
        ]  # fmt: skip


_WHITESPACE = re.compile(r"[ \n\r\t]{2,}")


def train_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Learn a tokenizer from texts and write it to `folder/tokenizer.model`, all or nothing.

    The same texts give the same bytes. Where they support fewer ids than `vocab_size`, it has those, and says so.

    Args:
        texts: what it learns from.
        vocab_size: ids that are asked for: bytes, special and whitespace pieces included.
        folder: made where it is missing.

    Raises:
        InputError: there is no text, or `vocab_size` is too small for its characters.
    """
    if not any(text.strip() for text in _sentences(texts)):
        raise InputError("the corpus has no text to train a tokenizer on; check data.corpus")
    whole = [*ESCAPES.values(), *whitespace_pieces(texts, vocab_size // PIECES_PER_WHITESPACE)]
    size = vocab_size
    while (model := _train(texts, size, whole)) is None or isinstance(model, int):
        assert model is not None
        size = model
    if size < vocab_size:
        log.info("tokenizer: the text supports %d token ids; %d were asked for", size, vocab_size)
    return _write({MODEL_FILE: model}, folder)


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Write a tokenizer to another folder, which is made where it is missing, all or nothing."""
    return _write(tokenizer.files(), folder)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer has been written to a folder."""
    return (folder / MODEL_FILE).exists() or (folder / JSON_FILE).exists()


def _write(files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = folder / (name + ".partial")
        partial.write_bytes(content)
        partial.rename(folder / name)
    return Tokenizer.load(folder)


def whitespace_pieces(texts: Iterable[str], number: int) -> list[str]:
    """The runs of whitespace that save the most characters as pieces of their own."""
    runs: collections.Counter[str] = collections.Counter()
    for text in texts:
        runs.update(_WHITESPACE.findall(text))
    saved = {run: count * (len(run) - 1) for run, count in runs.items() if len(run) <= 64 and count > 1}
    return sorted(saved, key=lambda run: (-saved[run], run))[:number]


def _train(texts: Sequence[str], vocab_size: int, whole: Sequence[str]) -> bytes | int:
    """The model's bytes, or the largest vocabulary that the texts support."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=[piece.replace(" ", SPACE) for piece in whole],
            byte_fallback=True,
            # Pieces such as "self." and "):" make code a tenth shorter.
            split_by_unicode_script=False,
            character_coverage=CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=2**30,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"Please set it to a value <= (\d+)", str(error)):
            return int(found[1])
        if "required_chars" in str(error):
            raise InputError(
                f"tokenizer.vocab_size = {vocab_size} is too small for the characters of this text; double it"
            ) from None
        raise
    return out.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """What the trainer can take: no NUL, which it skips a text for."""
    for text in texts:
        for plain, escaped in ESCAPES.items():
            text = text.replace(plain, escaped)
        yield text.replace("\0", "")
