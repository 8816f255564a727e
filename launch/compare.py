"""Run an experiment: train variants of a config with several seeds, and tell which learns more.

FILE is TOML: config = "tiny", seeds = [0, 1, 2], and for each variant a table of the fields that it changes, as in
[variants.muon] optimizer.name = "muon". The runs are ordinary ones in FOLDER/VARIANT-SEED: the same command again goes
on where it stopped. FOLDER/compare.html shows their curves over each other.
"""

import argparse

from launch.arguments import add_json, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat compare`."""
    parser.add_argument("file", metavar="FILE", type=path, help="an experiment, in TOML")
    parser.add_argument("--to", metavar="FOLDER", type=path, help="folder of the runs [runs/NAME, for NAME.toml]")
    help = "print a command for each run that is not finished, to start it elsewhere, and train nothing here"
    parser.add_argument("--print-commands", action="store_true", help=help)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the experiment."""
    from launch.compare_runs import run_experiment

    return run_experiment(arguments)
