"""Pretrain a model from raw text. The same command again goes on with the run in train.run_dir."""

import argparse

from launch.presets import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat pretrain`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train; the summary goes to standard output."""
    config = load_config(arguments.config, arguments.overrides)
    import jax

    from train.loop import pretrain
    from train.mesh import join_processes

    join_processes()
    summary = pretrain(config)
    if jax.process_index() == 0:
        print(summary)
    return 0
