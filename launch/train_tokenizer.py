"""Train a tokenizer on the corpus of a config, for runs that share it (tokenizer.path)."""

import argparse
import os
import tempfile
from pathlib import Path

from data.errors import InputError
from launch.presets import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat tokenize`."""
    add_config_arguments(parser)
    parser.add_argument(
        "--to", required=True, type=os.path.expanduser, metavar="DIR", help="a new folder for the tokenizer"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train and write it; what it is goes to standard output."""
    config = load_config(arguments.config, arguments.overrides)
    if config.tokenizer.path is not None:
        raise InputError(f"tokenizer.path = {config.tokenizer.path} is one already; leave it out to train another")
    if Path(arguments.to).exists():
        raise InputError(f"--to={arguments.to} exists already; name a new folder")
    from train.prepare import open_run_mixture, train_run_tokenizer
    from train.run.folder import Run

    with tempfile.TemporaryDirectory() as folder:
        mixture = open_run_mixture(config, Run(Path(folder)))
        tokenizer = train_run_tokenizer(config, mixture, Path(arguments.to))
    print(f"{arguments.to}: {tokenizer.vocab_size} token ids, fingerprint {tokenizer.fingerprint[:12]}")
    return 0
