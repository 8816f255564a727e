"""Write a run's weights and tokenizer for inference elsewhere."""

import argparse
import os
from pathlib import Path

from data.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat export`."""
    parser.add_argument("model", metavar="RUN", help="a run's folder, or RUN@STEP")
    parser.add_argument(
        "--format", required=True, choices=["hf"], help="hf: a folder that Hugging Face Transformers opens"
    )
    parser.add_argument(
        "--to",
        required=True,
        type=os.path.expanduser,
        metavar="DIR",
        help="the folder; an earlier export is replaced",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export; the folder goes to standard output."""
    import jax

    from train.mesh import on_one_device
    from train.run import load_trained
    from train.weights import check_export_folder, write_huggingface

    check_export_folder(Path(arguments.to))
    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        if trained.step is None:
            raise InputError(f"{arguments.model} holds exported weights already; give a run's folder")
        context = trained.config.data.segment_length
        to = Path(arguments.to)
        write_huggingface(to, trained.config.model, trained.weights, trained.tokenizer, context, trained.step)
    print(arguments.to)
    return 0
