"""Fill-in-the-middle: some documents are trained on with their middle last, so that a model learns to fill gaps.

Two cuts, drawn uniformly over the characters, make of a document a prefix, a middle and a suffix, any of which may be
empty. With the marks P, S and M, three tokens that no text can contain, the document becomes one of

- PSM: P prefix S suffix M middle
- SPM: P S suffix M prefix middle

and ends after the middle. Each piece is encoded alone, as a prompt will be. (Bavarian et al. 2022, arXiv:2207.14255;
SPM is its second variant, which StarCoder and Code Llama use too. Qwen2.5-Coder has PSM alone.)

The seed, the file and the place of a document decide alone whether it is transformed, where it is cut, and in which
order its pieces come: on any machine, in every epoch, and where a stream resumes in the middle of the document (C1).
All of its characters are trained on once (C2); the marks are three tokens more. Conversations and documents with a
prompt stay as they are, and so do pieces of a long .txt without its end, after which no end could follow the middle.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.config import DataConfig, ResolvedDataConfig
from data.corpus import stable_hash
from data.document import Document
from data.errors import InputError
from data.tokenizer.tokenizer import Tokenizer

# Texts to encode, and ids of tokens between them.
Pieces = list[str | int]


class Marks(NamedTuple):
    """The ids of the tokens before a prefix, a suffix and a middle."""

    prefix: int
    suffix: int
    middle: int


class Infill(NamedTuple):
    """The cuts of a document, in characters: its middle is `begin` to `end`; with `spm` its suffix comes first."""

    begin: int
    end: int
    spm: bool
    marks: Marks

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Returns the characters of prefix, suffix and middle of a text of this length, in the order of training."""
        prefix, suffix, middle = (0, self.begin), (self.end, length), (self.begin, self.end)
        return [suffix, prefix, middle] if self.spm else [prefix, suffix, middle]

    def pieces(self, text: str) -> Pieces:
        """Returns the pieces of a text, with marks."""
        first, second, middle = (text[begin:end] for begin, end in self.spans(len(text)))
        P, S, M = self.marks
        return [P, S, first, M, second, middle] if self.spm else [P, first, S, second, M, middle]


@dataclass(frozen=True)
class Infilling:
    """The transform of one corpus.

    Attributes:
        rate: share of the documents that are transformed.
        spm_rate: share of those in the order SPM.
        found_in_texts: pattern of names of marks that the tokenizer would find in a text, or None.
    """

    rate: float
    spm_rate: float
    seed: int
    marks: Marks
    found_in_texts: re.Pattern[str] | None = None

    def infill(self, document: Document) -> Infill | None:
        """Returns the cuts of a document, or None if it stays as it is."""
        is_text = document.ends and not document.prompt and document.answers is None
        if not is_text or self._draw("fim", document) >= self.rate * 2**64:
            return None
        cuts = (self._draw(name, document) % (len(document.text) + 1) for name in ("fim cut", "fim other cut"))
        begin, end = sorted(cuts)
        return Infill(begin, end, self._draw("fim order", document) < self.spm_rate * 2**64, self.marks)

    def _draw(self, name: str, document: Document) -> int:
        """Returns a number below 2⁶⁴."""
        return stable_hash(name, self.seed, document.file, document.place)

    def without_marks(self, pieces: Pieces) -> Pieces:
        """Cuts texts after the first character of each name of a mark, which is then not found in them."""
        if self.found_in_texts is None:
            return pieces
        split = [self.found_in_texts.split(piece) if isinstance(piece, str) else [piece] for piece in pieces]
        return [piece for parts in split for piece in parts]


def open_infillings(
    configs: Sequence[ResolvedDataConfig], tokenizer: Tokenizer, seed: int
) -> list[Infilling] | list[None]:
    """Returns the transform of each corpus of a mixture; none if no document of any is transformed.

    Raises InputError as `mark_names`.
    """
    if not any(config.fim_rate for config in configs):
        return [None] * len(configs)
    names = mark_names(configs[0], tokenizer)
    return [make_infilling(tokenizer, names, c.fim_rate, c.fim_spm_rate, seed) for c in configs]


def make_infilling(
    tokenizer: Tokenizer, names: tuple[str, str, str], rate: float, spm_rate: float, seed: int = 0
) -> Infilling:
    """Returns the transform with these names of marks."""
    ids = [tokenizer.pieces.index(name) for name in names]
    # Tokenizers never find control tokens in a text, but they do find other added ones.
    found = [name for name, i in zip(names, ids, strict=True) if tokenizer.token_kinds[i] != "control"]
    pattern = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in found)
    return Infilling(rate, spm_rate, seed, Marks(*ids), re.compile(pattern) if found else None)


def middle_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, spm: bool) -> list[int]:
    """Returns the ids after which a model writes the middle between two texts, as in training.

    Raises InputError if the tokenizer has no marks that are known, or puts a space before each piece.

    Args:
        spm: the order is SPM, not PSM.
    """
    if tokenizer.fim_tokens is None or tokenizer.adds_space:
        why = "has no tokens that are known to mark prefix, suffix and middle"
        if tokenizer.adds_space:
            why = "puts a space before every text, so also before each piece of a word that is cut"
        raise InputError(f"the tokenizer of {tokenizer.folder} {why}; give a model that was trained with data.fim_rate")
    infilling = make_infilling(tokenizer, tokenizer.fim_tokens, 1.0, float(spm))
    pieces = Infill(len(prefix), len(prefix), spm, infilling.marks).pieces(prefix + suffix)
    ids = [*tokenizer.bos_ids]
    for piece in infilling.without_marks(pieces):
        ids += tokenizer.encode(piece).tolist() if isinstance(piece, str) else [piece]
    return ids


def mark_names(config: DataConfig, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Returns the names of the marks: those of `data.fim_tokens`, or those that the tokenizer is known for.

    Raises InputError if the tokenizer has none, or puts a space before each piece.
    """
    if tokenizer.adds_space:
        raise InputError(
            f"data.fim_rate: the tokenizer of {tokenizer.folder} puts a space before every text, so also before the "
            "pieces of a word that is cut; take another tokenizer"
        )
    if config.fim_tokens is None:
        if tokenizer.fim_tokens is None:
            raise InputError(
                f"data.fim_rate: the tokenizer of {tokenizer.folder} has no tokens that are known to mark prefix, "
                "suffix and middle; name three of its added tokens with data.fim_tokens, or train one with "
                "data.fim_rate above 0"
            )
        return tokenizer.fim_tokens
    prefix, suffix, middle = config.fim_tokens.split(",")
    for name in (prefix, suffix, middle):
        if name not in tokenizer.added_tokens:
            has = ", ".join(sorted(tokenizer.added_tokens)[:20])
            raise InputError(
                f"data.fim_tokens: the tokenizer of {tokenizer.folder} has no added token {name!r}; it has {has}"
            )
    return prefix, suffix, middle
