"""Exports a tokenizer to the files of Hugging Face's `tokenizers` and Transformers, with the same ids for every text
(except a text without a cut in a million characters, see `Tokenizer.parts`).

Tokenizers of other projects are written as they were read. Transformers puts the EOS token before a text, as it
precedes every document in training.

Both libraries do BPE over a whole text. Where SentencePiece writes U+2581 for a space, this file has the space itself,
so nothing is normalized, and pieces that SentencePiece keeps whole (whitespace runs, escapes) are added tokens.
"""

import json
from pathlib import Path
from typing import Any

from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.tokenizer import END_OF_TEXT, ESCAPES, JSON_FILE, SPACE, Tokenizer


def write_huggingface_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and, for our own, `tokenizer.model` to a folder.

    Args:
        folder: folder to write to; it must exist.
    """
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": bos_post_processor(END_OF_TEXT, tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(plain_pieces(tokenizer))},
            "merges": merge_pairs(tokenizer),
        },
    }
    (folder / JSON_FILE).write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        # A document that contains the text of a special token means the text.
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def bos_post_processor(token: str, number: int) -> dict[str, Any]:
    """Returns the post-processor that puts a token before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def plain_pieces(tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each id as it appears in a document."""
    plain = {piece: text for text, piece in ESCAPES.items()}
    return [plain.get(piece, piece.replace(SPACE, " ")) for piece in tokenizer.pieces]


def added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns the tokens that are matched before BPE, and the special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": content, **flags, "special": kind in ("unknown", "control")}
        for i, (content, kind) in enumerate(zip(plain_pieces(tokenizer), tokenizer.token_kinds, strict=True))
        if kind in ("unknown", "control", "whole")
    ]


def merge_pairs(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Returns every pair of pieces that forms a piece, in the order of the pieces: SentencePiece merges all of them."""
    pieces = {
        piece: i
        for i, (piece, kind) in enumerate(zip(plain_pieces(tokenizer), tokenizer.token_kinds, strict=True))
        if kind == "piece"
    }
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
