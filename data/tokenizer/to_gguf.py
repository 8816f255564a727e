"""Exports a tokenizer to the metadata of a GGUF file, with the same ids in llama.cpp.

- Our own, and vocabularies with byte fallback, become its "llama" (SentencePiece's BPE): the pair whose piece has the
  highest score is merged first. Whitespace runs and escapes are user-defined tokens, which are matched before. It
  matches the longest in a text first, SentencePiece the one that begins first, so a run that is not a piece itself may
  be split elsewhere.
- Byte-level ones become its "gpt2", with merges, and a name for the pre-tokenizer.

llama.cpp writes a space as U+2581, as SentencePiece does, and does not escape a real one: it reads it as a space.
"""

import itertools
from typing import Any

from data.errors import InputError
from data.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.tokenizer import ESCAPES, SPACE, Tokenizer, merge_pairs, plain_text

# llama.cpp's numbers of our `Tokenizer.token_kinds`.
GGUF_TOKEN_TYPES = {"piece": 1, "unknown": 2, "control": 3, "whole": 4, "unused": 5, "byte": 6}
CONTRACTION_PATTERN = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST_PATTERN = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name by (pre-tokenizer pattern, whether a word that is a piece is kept whole); None is GPT-2's pattern.
PRE_TOKENIZERS = {
    (None, False): "gpt-2",
    (rf"{CONTRACTION_PATTERN}|{WORD_PATTERN}|\p{{N}}{{1,3}}|{REST_PATTERN}", True): "llama-bpe",
    (rf"{CONTRACTION_PATTERN}|{WORD_PATTERN}|\p{{N}}{{1,3}}|{REST_PATTERN}", False): "smaug-bpe",
    (rf"{CONTRACTION_PATTERN}|{WORD_PATTERN}|\p{{N}}|{REST_PATTERN}", False): "qwen2",
}


def gguf_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Returns the keys after "tokenizer.ggml." and their values.

    Args:
        vocab_size: vocabulary size of the model; ids without a piece become unused tokens.

    Raises:
        InputError: llama.cpp would compute other ids.
    """
    if len(tokenizer.bos_ids) > 1:
        raise _refused(tokenizer, "puts several tokens before a text")
    num_unused = vocab_size - tokenizer.vocab_size
    kinds = [*tokenizer.token_kinds, *["unused"] * num_unused]
    texts = [*tokenizer.pieces, *[""] * num_unused]
    metadata: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_ids[0],
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    if marks := tokenizer.fim_ids():
        metadata |= dict(zip(("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"), marks, strict=True))
    if isinstance(tokenizer, SentencePieceTokenizer):
        scores = tokenizer.scores()
        for i, (text, kind) in enumerate(zip(tokenizer.pieces, tokenizer.token_kinds, strict=True)):
            if text == ESCAPES[SPACE]:
                # The text U+2581 is taken: it is found where a space is. A model that writes it writes a space.
                texts[i], kinds[i] = " ", "piece"
            elif kind == "whole":
                texts[i] = plain_text(text)
        metadata |= {"model": "llama", "add_space_prefix": False}
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        if tokenizer.byte_level:
            merges = [" ".join(pair) for pair in tokenizer.merges()]
            metadata |= {"model": "gpt2", "pre": _pre(tokenizer), "merges": merges}
            scores = []
        else:
            scores = _scores(tokenizer)
            kinds = ["piece" if kind == "whole" and scores[i] else kind for i, kind in enumerate(kinds)]
            metadata |= {"model": "llama", "add_space_prefix": tokenizer.adds_space}
    if scores:
        metadata["scores"] = [*scores, *[0.0] * num_unused]
    if "unknown" in kinds:
        metadata["unknown_token_id"] = kinds.index("unknown")
    texts = [text or f"[unused {i}]" for i, text in enumerate(texts)]
    return metadata | {"tokens": texts, "token_type": [GGUF_TOKEN_TYPES[kind] for kind in kinds]}


def _pre(tokenizer: HuggingFaceTokenizer) -> str:
    """Returns llama.cpp's name of the pre-tokenizer."""
    model, steps = tokenizer.settings["model"], tokenizer.steps("pre_tokenizer")
    pattern, splits = None, False
    if [step["type"] for step in steps] == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        splits = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"] and not steps[1]["use_regex"]
    elif [step["type"] for step in steps] == ["ByteLevel"]:
        splits = steps[0].get("use_regex", True)
    name = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges"))))
    # llama.cpp does not normalize; NFC is accepted, since texts usually hold composed characters.
    normalized = [step["type"] for step in tokenizer.steps("normalizer")] not in ([], ["NFC"])
    if name is None or not splits or steps[-1]["add_prefix_space"] or normalized:
        raise _refused(tokenizer, "splits a text in a way that llama.cpp has no name for")
    return name


def _scores(tokenizer: HuggingFaceTokenizer) -> list[float]:
    """Returns SentencePiece scores that follow from the merges: higher for earlier pieces, otherwise 0."""
    steps = [*tokenizer.steps("normalizer"), *tokenizer.steps("pre_tokenizer")]
    if not {step["type"] for step in steps} <= {"Prepend", "Replace", "Metaspace", "Split"} or not steps:
        raise _refused(tokenizer, "changes a text in a way that llama.cpp does not")
    ids = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    pairs = tokenizer.merges()
    made = [one + other for one, other in pairs]
    order = list(dict.fromkeys(made))
    # SentencePiece joins every pair that makes a piece, and those that make the same one at the same time.
    grouped = [piece for piece, _ in itertools.groupby(made)]
    kinds = zip(tokenizer.pieces, tokenizer.token_kinds, strict=True)
    every = merge_pairs(piece for piece, kind in kinds if kind in ("piece", "whole"))
    if grouped != order or set(every) != set(pairs):
        raise _refused(tokenizer, "joins pieces in an order that SentencePiece's scores cannot say")
    scores = [0.0] * tokenizer.vocab_size
    for rank, piece in enumerate(order, start=1):
        scores[ids[piece]] = -float(rank)
    return scores


def _refused(tokenizer: Tokenizer, why: str) -> InputError:
    return InputError(f"the tokenizer of {tokenizer.folder} cannot go into a GGUF file: it {why}; export --format=hf")
