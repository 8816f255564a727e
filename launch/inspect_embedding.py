"""List the tokens whose embeddings have the highest cosine similarity to a word's, or to word − minus + plus.

A word is the one token that spells it inside a text, with a space before it, or else at the beginning of a text; where
both take several tokens, the mean of their embeddings counts. The log names the tokens of each word.
"""

import argparse
import json
import logging
from typing import TYPE_CHECKING

from data.errors import InputError
from launch.arguments import add_json, add_model, text, too_small
from launch.columns import columns

if TYPE_CHECKING:
    from data.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("ziggurat")

# Flag of a word → the sign of its embedding in the sum.
SIGNS = {"word": 1, "minus": -1, "plus": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat inspect embedding`."""
    add_model(parser)
    parser.add_argument("--word", type=text, required=True, metavar="TEXT", help="whose neighbours to list, as in king")
    parser.add_argument("--minus", type=text, metavar="TEXT", help="a word to subtract, as in man")
    parser.add_argument("--plus", type=text, metavar="TEXT", help="a word to add, as in woman")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many tokens to list [10]")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the nearest tokens."""
    problems = [f"--{name} is empty; give a word" for name in SIGNS if getattr(arguments, name) == ""]
    if problems := problems + too_small(arguments, {"top": 1}):
        raise InputError("\n".join(problems))
    import jax
    import numpy as np

    from train.devices.mesh import one_device_mesh
    from train.evaluation.inspection import nearest_tokens, token_text
    from train.weights.load import load_trained

    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(arguments.model, predicts=False)
    tokenizer = trained.tokenizer
    table_VD = np.asarray(trained.weights["embedding"]["table"], np.float32)[: tokenizer.vocab_size]
    words = {name: tokens_of(tokenizer, getattr(arguments, name)) for name in SIGNS if getattr(arguments, name)}
    for name, tokens in words.items():
        texts = ", ".join(repr(token_text(tokenizer, token)) for token in tokens)
        log.info("--%s=%s: %s%s", name, getattr(arguments, name), "the mean of " * (len(tokens) > 1), texts)
    query_D = np.sum([SIGNS[name] * table_VD[tokens].mean(axis=0) for name, tokens in words.items()], axis=0)
    if not query_D.any():
        raise InputError("--word, --minus and --plus cancel each other; give other words")
    left_out = {token for tokens in words.values() for token in tokens}
    left_out.update(token for token in range(len(table_VD)) if not tokenizer.token_bytes(token))
    nearest = [
        {"token": token_text(tokenizer, token), "id": token, "cosine": cosine}
        for token, cosine in nearest_tokens(table_VD, query_D, left_out, arguments.top)
    ]
    if arguments.json:
        print(json.dumps({"tokens": words, "nearest": nearest}))
        return 0
    rows = [(repr(row["token"]), row["id"], f"{row['cosine']:.4f}") for row in nearest]
    print(columns([("token", "id", "cosine"), *rows], right={1, 2}))
    return 0


def tokens_of(tokenizer: "Tokenizer", word: str) -> list[int]:
    """Returns the single token that spells a word, or else its several tokens; a space that the user gave is kept."""
    spellings = [word] if word[0].isspace() else [f" {word}", word]
    encoded = [tokenizer.encode(spelling).tolist() for spelling in spellings]
    return next((tokens for tokens in encoded if len(tokens) == 1), encoded[0])
