"""Reads a tokenizer from a folder, and writes one to another."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from data.errors import InputError
from data.files.atomic import atomic_file
from data.files.json_file import read_small_file
from data.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.tokenizer import JSON_FILE, MODEL_FILE, Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer of a folder: ours, or else the one in its `tokenizer.json`.

    Raises:
        InputError: the folder holds no tokenizer, or one that is damaged or of another kind.
    """
    own, other = folder / MODEL_FILE, folder / JSON_FILE
    if own.is_file():
        try:
            tokenizer = SentencePieceTokenizer(folder, read_small_file(own))
            with suppress(InputError):
                # Transformers adds tokens to its own file alone.
                if other.is_file() and (theirs := HuggingFaceTokenizer(folder)).vocab_size > tokenizer.vocab_size:
                    return theirs
            return tokenizer
        except InputError:
            raise
        except (RuntimeError, ValueError):
            if not other.is_file():
                raise InputError(
                    f"{own} is damaged, or not made by `ziggurat tokenize`; restore it, or put the {JSON_FILE} of "
                    "its makers next to it"
                ) from None
    if other.is_file():
        return HuggingFaceTokenizer(folder)
    raise InputError(f"{folder} holds no tokenizer ({MODEL_FILE} or {JSON_FILE}); make one with `ziggurat tokenize`")


def holds_tokenizer(folder: Path) -> bool:
    """True if a folder holds a tokenizer."""
    return (folder / MODEL_FILE).exists() or (folder / JSON_FILE).exists()


def write_tokenizer(files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    """Writes `Tokenizer.files` to a folder, which is created if necessary, each atomically, and loads the tokenizer."""
    for name, content in files.items():
        with atomic_file(folder / name) as partial:
            partial.write_bytes(content)
    return load_tokenizer(folder)
