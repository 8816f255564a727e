"""Loss and bits per byte of a run or of exported weights: on the run's held-out documents, or on another corpus."""

import argparse
import dataclasses
import json
from typing import Any

from data.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat evaluate`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument(
        "--corpus", metavar="PATH", help="file, folder, glob or URL of text; all of its documents count"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the figures go to standard output."""
    import jax

    from data.corpus import open_corpus
    from train.evaluate import evaluate, gzip_bits_per_byte, make_evaluation_step, total
    from train.mesh import on_one_device
    from train.run import Text, load_trained

    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        config = trained.config
        if arguments.corpus is not None:
            # Nothing is held out of it, so that a short text is enough.
            whole = dataclasses.replace(config.data, num_streams=1, validation_fraction=0.0)
            found = open_corpus(arguments.corpus, whole, field="--corpus").all_documents()
            texts = [Text(document.text, document.prompt) for document in found]
        elif trained.run is None:
            raise InputError(f"{arguments.model} holds weights without documents; give --corpus=PATH")
        elif not (texts := trained.run.held_out_texts()):
            raise InputError(f"{arguments.model} held no documents out; give --corpus=PATH")
        if not texts:
            raise InputError(f"--corpus={arguments.corpus} has no text to evaluate on")
        results = evaluate(make_evaluation_step(config), trained.weights, texts, trained.tokenizer, config)

    figures: dict[str, Any] = dataclasses.asdict(total(results.values())) | {
        "gzip_bits_per_byte": gzip_bits_per_byte(texts)
    }
    if trained.step is not None:
        figures = {"step": trained.step} | figures
    by_corpus = {name: dataclasses.asdict(result) for name, result in results.items()} if len(results) > 1 else {}
    if arguments.json:
        print(json.dumps(figures | ({"by_corpus": by_corpus} if by_corpus else {})))
        return 0
    print("\n".join(line(name, value) for name, value in figures.items()))
    for corpus, of_corpus in by_corpus.items():
        print("\n".join([f"corpus {corpus}", *(f"  {line(name, value)}" for name, value in of_corpus.items())]))
    return 0


def line(name: str, value: float) -> str:
    """A figure of the table."""
    return f"{name:18} {value:,.4f}" if isinstance(value, float) else f"{name:18} {value:,}"
