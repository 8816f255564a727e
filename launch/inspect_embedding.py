"""The tokens whose embeddings point most nearly as a word's does, or as word − minus + plus.

A word is the token that it is in the middle of a text, with a space before it, or the one that it is at a beginning;
else the mean of its tokens. Which it was goes to standard error.
"""

import argparse
import json
import logging
from typing import TYPE_CHECKING

from data.errors import InputError

if TYPE_CHECKING:
    from data.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("ziggurat")

WORDS = ("word", "minus", "plus")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat inspect embedding`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument("--word", required=True, metavar="TEXT", help="whose neighbours are wanted, as in king")
    parser.add_argument("--minus", metavar="TEXT", help="what is taken from it, as in man")
    parser.add_argument("--plus", metavar="TEXT", help="what is added to it, as in woman")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="how many tokens are shown [10]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Find the tokens; the table goes to standard output."""
    check(arguments)
    import jax
    import numpy as np

    from train.devices.mesh import on_one_device
    from train.evaluation.inspection import nearest_tokens, token_text
    from train.weights.load import load_trained

    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
    tokenizer = trained.tokenizer
    table_VD = np.asarray(trained.weights["embedding"]["table"], np.float32)[: tokenizer.vocab_size]
    given = {name: tokens_of(tokenizer, getattr(arguments, name)) for name in WORDS if getattr(arguments, name)}
    for name, tokens in given.items():
        texts = ", ".join(repr(token_text(tokenizer, token)) for token in tokens)
        log.info("--%s=%s: %s%s", name, getattr(arguments, name), "the mean of " * (len(tokens) > 1), texts)
    signs = {"word": 1, "minus": -1, "plus": 1}
    query_D = np.sum([signs[name] * table_VD[tokens].mean(axis=0) for name, tokens in given.items()], axis=0)
    if not query_D.any():
        raise InputError("--word, --minus and --plus cancel each other; give other words")
    textless = [token for token in range(len(table_VD)) if not tokenizer.token_bytes(token)]
    own = {token for tokens in given.values() for token in tokens}
    found = [
        {"token": token_text(tokenizer, token), "id": token, "cosine": cosine}
        for token, cosine in nearest_tokens(table_VD, query_D, own.union(textless), arguments.top)
    ]
    if arguments.json:
        print(json.dumps({"tokens": given, "nearest": found}))
        return 0
    width = max(len(repr(row["token"])) for row in found)
    print(f"{'token':{width}}  {'id':>7}  cosine")
    for row in found:
        print(f"{row['token']!r:{width}}  {row['id']:>7}  {row['cosine']:6.4f}")
    return 0


def tokens_of(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The token of a word, or its tokens where it has several; a space at its beginning is the user's own."""
    spellings = [text] if text[0].isspace() else [f" {text}", text]
    found = [tokenizer.encode(spelling).tolist() for spelling in spellings]
    return next((tokens for tokens in found if len(tokens) == 1), found[0])


def check(arguments: argparse.Namespace) -> None:
    """InputError with everything that is wrong with the flags."""
    problems = []
    for name in WORDS:
        if (text := getattr(arguments, name)) is None:
            continue
        if not text:
            problems.append(f"--{name} is empty; give a word")
        try:
            text.encode()
        except UnicodeEncodeError:
            problems.append(f"--{name} is not valid UTF-8")
    if arguments.top < 1:
        problems.append(f"--top={arguments.top} must be at least 1")
    if problems:
        raise InputError("\n".join(problems))
