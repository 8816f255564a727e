"""Trains a SentencePiece tokenizer."""

import collections
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data.errors import InputError
from data.tokenizer.folder import write_tokenizer
from data.tokenizer.sentencepiece_tokenizer import escaped, log
from data.tokenizer.tokenizer import END_OF_TEXT, ESCAPES, MODEL_FILE, SPACE, Tokenizer

# Number of vocabulary pieces for each whitespace piece.
PIECES_PER_WHITESPACE = 64
# The trainer skips every text that holds NUL or U+2585, its own sign for unknown pieces.
RESERVED = str.maketrans("", "", "\0\u2585")


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, folder: Path, control_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Trains a tokenizer on texts and writes it to `folder/tokenizer.model`, atomically.

    The same texts give the same bytes. If they support fewer ids than `vocab_size`, the tokenizer has those, and a log
    line says so.

    Args:
        vocab_size: requested number of ids, including bytes, special and whitespace pieces.
        control_tokens: names of special tokens, which are never found in a text.

    Raises:
        InputError: there is no text, or `vocab_size` is too small for its characters.
    """
    if not any(text.strip() for text in _sentences(texts)):
        raise InputError("the corpus has no text to train a tokenizer on; check data.corpus")
    whole = [*ESCAPES.values(), *whitespace_pieces(texts, vocab_size // PIECES_PER_WHITESPACE)]
    size = vocab_size
    while isinstance(model := _train(texts, size, whole, control_tokens), int):
        size = model
    if size < vocab_size:
        log.info("tokenizer: the text supports %d token ids; %d were asked for", size, vocab_size)
    return write_tokenizer({MODEL_FILE: model}, folder)


def whitespace_pieces(texts: Iterable[str], number: int) -> list[str]:
    """Returns the runs of whitespace that save the most characters as pieces of their own."""
    runs = collections.Counter(run for text in texts for run in re.findall(r"[ \n\r\t]{2,}", text))
    saved = {run: count * (len(run) - 1) for run, count in runs.items() if len(run) <= 64 and count > 1}
    return sorted(saved, key=lambda run: (-saved[run], run))[:number]


def _train(texts: Sequence[str], vocab_size: int, whole: Sequence[str], control_tokens: Sequence[str]) -> bytes | int:
    """Returns the bytes of the model, or the largest vocabulary that the texts support."""
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_sentences(texts),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            control_symbols=[*control_tokens],
            user_defined_symbols=[piece.replace(" ", SPACE) for piece in whole],
            byte_fallback=True,
            # Pieces such as "self." and "):" make code a tenth shorter.
            split_by_unicode_script=False,
            character_coverage=0.9995,
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
        if largest := re.search(r"Please set it to a value <= (\d+)", str(error)):
            return int(largest[1])
        if "required_chars" in str(error):
            raise InputError(
                f"tokenizer.vocab_size = {vocab_size} is too small for the characters of this text; double it"
            ) from None
        raise
    return out.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields escaped texts without the characters that the trainer reserves. A model writes those as bytes."""
    return (escaped(text).translate(RESERVED) for text in texts)
