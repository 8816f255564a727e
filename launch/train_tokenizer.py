"""Train a tokenizer on the corpus of a config, for runs that share it (tokenizer.path)."""

import argparse
import tempfile
from pathlib import Path

from data.errors import InputError
from launch.arguments import path
from launch.presets import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat tokenize`."""
    add_config_arguments(parser)
    parser.add_argument("--to", required=True, type=path, metavar="DIR", help="a new folder for the tokenizer")


def run(arguments: argparse.Namespace) -> int:
    """Trains the tokenizer and prints its folder, size and fingerprint."""
    config = load_config(arguments.config, arguments.overrides)
    if config.tokenizer.path is not None:
        raise InputError(f"tokenizer.path = {config.tokenizer.path} is one already; leave it out to train another")
    from data.files.atomic import atomic_folder, check_new
    from train.prepare import open_run_mixture, train_run_tokenizer
    from train.run.folder import Run

    check_new(arguments.to)
    with tempfile.TemporaryDirectory() as folder:
        mixture = open_run_mixture(config, Run(Path(folder)))
        with atomic_folder(arguments.to) as partial:
            tokenizer = train_run_tokenizer(config, mixture, partial)
    print(f"{arguments.to}: {tokenizer.vocab_size} token ids, fingerprint {tokenizer.fingerprint[:12]}")
    return 0
