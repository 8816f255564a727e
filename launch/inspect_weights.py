"""Check a folder of weights: its class and layout, what each setting means here, and its logits against Transformers.

Without --against the logits of this decoder are compared with those of Transformers for the same folder, where that is
installed; with it, with those of another folder. The exit status is 1 where they differ.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from launch.arguments import add_json, path, prompt
from launch.columns import columns

PROMPT = "The first law of robotics: a robot may not injure a human being or, through inaction, allow harm."
# Tokens of a comparison, at most.
MOST_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat inspect weights`."""
    parser.add_argument("weights", type=path, metavar="WEIGHTS", help="a folder with config.json and safetensors")
    parser.add_argument("--against", type=path, metavar="WEIGHTS", help="another folder, to compare logits with")
    parser.add_argument("--prompt", type=prompt, default=PROMPT, metavar="TEXT", help="the text to compare on")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the settings and the comparison."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from model.interchange.meaning import meanings
    from train.weights.huggingface import open_tensors, read_config
    from train.weights.load import check_predicts

    folder: Path = arguments.weights
    hf_config = read_config(folder)
    rows = [(key, _short(hf_config[key]), meaning) for key, meaning in meanings(hf_config).items()]
    if not arguments.json:
        print(columns([("config.json", "value", "here"), *rows]))
    model, _ = open_tensors(folder)
    check_predicts(model.config, folder)
    parameters = sum(math.prod(shape) for shape in model.shapes.values())
    tensors = f"{parameters:,} parameters in {len(model.shapes)} tensors, each in its place"
    texts, tokens = _tokens(folder, arguments.prompt, model.config.vocab_size, model.context)
    other, found, same = _compare(folder, arguments.against, tokens)
    if arguments.json:
        settings = {key: meaning for key, _, meaning in rows}
        values: dict[str, Any] = {"class": model.architecture, "parameters": parameters, "settings": settings}
        positions = [difference._asdict() for difference in found]
        print(json.dumps(values | {"against": other, "positions": positions, "same": same}))
        return int(same is False)
    print(f"\n{model.architecture}: {tensors}")
    if same is None:
        print("Transformers is not installed: logits were not compared; install it with PyTorch, or give --against")
        return 0
    lines = [("position", "input", "largest difference", "best here", "best there")]
    for t, (text, (largest, best, other_best)) in enumerate(zip(texts, found, strict=True)):
        lines.append((str(t), text, f"{largest:.1e}", str(best), "the same" if best == other_best else str(other_best)))
    print(f"\nlogits against {other}:\n{columns(lines, right={0, 2})}")
    largest = max(difference.largest for difference in found)
    print(f"{'the same' if same else 'NOT the same'}: the largest difference is {largest:.1e}")
    return int(not same)


def _short(value: object, most: int = 40) -> str:
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _tokens(folder: Path, text: str, vocab_size: int, context: int) -> tuple[list[str], list[int]]:
    """Returns the tokens of the text, as texts and as ids; of a folder without a tokenizer every id is as good."""
    from data.tokenizer.folder import load_tokenizer
    from train.evaluation.inspection import token_text

    most = min(MOST_TOKENS, context)
    try:
        tokenizer = load_tokenizer(folder)
    except InputError:
        tokens = [(17 * i + 5) % vocab_size for i in range(most)]
        return [f"<{token}>" for token in tokens], tokens
    tokens = [int(token) for token in tokenizer.encode_with_bos(text)][:most]
    return [repr(token_text(tokenizer, token)) for token in tokens], tokens


def _compare(folder: Path, against: Path | None, tokens: Sequence[int]) -> tuple[str | None, list[Any], bool | None]:
    """Returns the name of the other logits, the differences, and whether they are the same; None if there are none."""
    from train.weights import compare

    transformers = compare.has_transformers()
    if against is None and not transformers:
        return None, [], None
    there = folder if against is None else against
    here = compare.logits_here(folder, tokens)
    other = compare.logits_by_transformers(there, tokens) if transformers else compare.logits_here(there, tokens)
    try:
        found, same = compare.differences(here, other)
    except ValueError as error:
        raise InputError(f"{folder} and {there}: {error}; they are not the same model") from None
    return f"{there} by {'Transformers' if transformers else 'this decoder'}", found, same
