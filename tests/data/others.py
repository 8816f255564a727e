"""Small tokenizers of the kinds that other people make, as folders that Transformers opens."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.to_huggingface import bos_post_processor
from data.tokenizer.tokenizer import SPACE, merge_pairs
from tests.data.texts import code

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# What Llama 3 and Qwen split a text at before BPE, written by their tokenizer.json's.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
EOS = "<|endoftext|>"


def splits(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut by a pattern, then bytes as characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@cache
def byte_level(kind: str) -> dict[str, Any]:
    """The tokenizer.json of a byte-level BPE: gpt2, qwen, or llama3, with a token before a text."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = {"gpt2": GPT2, "llama3": splits(LLAMA3), "qwen": splits(QWEN)}[kind]
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(code()[:40], trainer)
    tokenizer.add_tokens(["<think>"])
    if kind == "llama3":
        before = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), before])
    return json.loads(tokenizer.to_str())


def byte_fallback(kind: str, learned: SentencePieceTokenizer) -> dict[str, Any]:
    """The tokenizer.json that Transformers makes of a SentencePiece model: llama2, with a space before, or gemma. <s>
    stands before both."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, kind in zip(learned.pieces, learned.token_kinds, strict=True) if kind == "piece"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = kind == "llama2"
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **flags} for i, piece in enumerate(pieces[:3])],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
        if first
        else replace,
        "pre_tokenizer": None,
        "post_processor": bos_post_processor("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merge_pairs(pieces[259:])],
        },
    }


def write(folder: Path, settings: dict[str, Any], eos: str | None) -> Path:
    """A folder with these files; where `eos` is none, nothing names it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    config |= {"clean_up_tokenization_spaces": False} | ({"eos_token": eos} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
