"""What the model learns at each position of a text, from one pass: the target, its loss, the three best predictions.

The last line has no target: it is what would come next.
"""

import argparse
import json
import math

from data.errors import InputError

BEST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat inspect loss`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text, one segment at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the text; the table goes to standard output."""
    try:
        size = len(arguments.prompt.encode())
    except UnicodeEncodeError:
        raise InputError("--prompt is not valid UTF-8") from None
    if not size:
        raise InputError("--prompt is empty; give some text")
    import jax

    from train.devices.mesh import on_one_device
    from train.evaluation.inspection import inspect_positions
    from train.weights.load import load_trained

    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        tokens, context = trained.tokenizer.encode(arguments.prompt), trained.config.data.segment_length
        if len(tokens) >= context:
            raise InputError(
                f"--prompt has {len(tokens)} tokens; the model sees {context}, of which one stands before a text"
            )
        rows = inspect_positions(trained.config, trained.weights, trained.tokenizer, tokens, BEST)
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    figures = {"loss": sum(losses) / len(losses), "bits_per_byte": sum(losses) / math.log(2) / size}
    if arguments.json:
        print(json.dumps({"positions": rows} | figures))
        return 0
    width = max(len(repr(row[name])) for row in rows for name in ("input", "target"))
    print(f"{'position':>8}  {'input':{width}}  {'target':{width}}  {'loss':>7}  best predictions")
    for row in rows:
        target, loss = (repr(row["target"]), f"{row['loss']:.4f}") if row["target"] is not None else ("", "")
        best = "  ".join(f"{best['token']!r} {best['probability']:.1%}" for best in row["best"])
        print(f"{row['position']:>8}  {row['input']!r:{width}}  {target:{width}}  {loss:>7}  {best}")
    print(f"loss {figures['loss']:.4f} nats a token, {figures['bits_per_byte']:.4f} bits a byte")
    return 0
