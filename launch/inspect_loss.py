"""Show what the model predicts at each position of a text, from one pass: the target, its loss, the best predictions.

The last line has no target: its predictions are of the token that would follow the text.
"""

import argparse
import json
import math

from data.errors import InputError
from launch.arguments import add_json, add_model, prompt
from launch.columns import columns

BEST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat inspect loss`."""
    add_model(parser)
    parser.add_argument("--prompt", type=prompt, required=True, metavar="TEXT", help="the text, one segment at most")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of all positions."""
    import jax

    from train.devices.mesh import one_device_mesh
    from train.evaluation.inspection import inspect_positions
    from train.weights.load import load_trained

    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(arguments.model)
        tokens, context = trained.tokenizer.encode(arguments.prompt), trained.config.data.segment_length
        before = len(trained.tokenizer.bos_ids)
        if before + len(tokens) > context:
            raise InputError(
                f"--prompt has {len(tokens)} tokens; the model sees {context}, with the {before} before every text"
            )
        positions = inspect_positions(trained.config, trained.weights, trained.tokenizer, tokens, BEST)
    losses = [position["loss"] for position in positions if position["loss"] is not None]
    loss = sum(losses) / len(losses)
    bits_per_byte = sum(losses) / math.log(2) / len(arguments.prompt.encode())
    if arguments.json:
        print(json.dumps({"positions": positions, "loss": loss, "bits_per_byte": bits_per_byte}))
        return 0
    rows = [("position", "input", "target", "loss", "best predictions")]
    for position in positions:
        has_target = position["target"] is not None
        target = repr(position["target"]) if has_target else ""
        best = "  ".join(f"{best['token']!r} {best['probability']:.1%}" for best in position["best"])
        shown_loss = f"{position['loss']:.4f}" if has_target else ""
        rows.append((position["position"], repr(position["input"]), target, shown_loss, best))
    print(columns(rows, right={0, 3}))
    print(f"loss {loss:.4f} nats a token, {bits_per_byte:.4f} bits a byte")
    return 0
