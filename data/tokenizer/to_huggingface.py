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
from data.tokenizer.tokenizer import END_OF_TEXT, JSON_FILE, Tokenizer, merge_pairs, plain_text


def write_huggingface_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and, for our own, `tokenizer.model` to an existing folder."""
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    plain = [plain_text(piece) for piece in tokenizer.pieces]
    kinds = tokenizer.token_kinds
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    written = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # The special tokens, and those that are matched before BPE.
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": kind in ("unknown", "control")}
            for i, (text, kind) in enumerate(zip(plain, kinds, strict=True))
            if kind in ("unknown", "control", "whole")
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": bos_post_processor(END_OF_TEXT, tokenizer.eos_id),
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
            "vocab": {text: i for i, text in enumerate(plain)},
            "merges": merge_pairs(text for text, kind in zip(plain, kinds, strict=True) if kind == "piece"),
        },
    }
    (folder / JSON_FILE).write_text(json.dumps(written, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        # A document that contains the text of a special token means the text, and the text of a template the token.
        "split_special_tokens": tokenizer.chat_template is None,
    }
    if tokenizer.fim_tokens:
        # Attributes of Transformers' tokenizer: `fim_prefix_token`, `fim_prefix_token_id` and so on.
        names = ("fim_prefix_token", "fim_suffix_token", "fim_middle_token")
        config["extra_special_tokens"] = dict(zip(names, tokenizer.fim_tokens, strict=True))
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
