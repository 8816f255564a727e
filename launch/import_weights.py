"""Take weights from elsewhere as a run, with their tokenizer: to evaluate, to generate, to pretrain further.

What is read is a folder of Hugging Face Transformers: Llama, Mistral, Qwen3, Gemma, GPT-2 or the first GPT, in
safetensors of any float dtype. The run holds them as the checkpoint of step 0, from which another one begins:

  ziggurat pretrain --config=RUN@0 --config.train.run_dir=FOLDER --config.data.corpus=PATH
"""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat import`."""
    parser.add_argument("weights", type=os.path.expanduser, metavar="WEIGHTS", help="a folder of weights")
    parser.add_argument("--to", required=True, type=os.path.expanduser, metavar="RUN", help="a new folder: the run's")


def run(arguments: argparse.Namespace) -> int:
    """Import; the run's folder goes to standard output."""
    import jax

    # All is read and written in the host's memory, however large an accelerator's is.
    jax.config.update("jax_platforms", "cpu")
    from train.weights.import_run import import_weights

    import_weights(Path(arguments.weights), Path(arguments.to))
    print(arguments.to)
    return 0
