"""Pretrain a model from raw text. The same command again goes on with the run in train.run_dir."""

import argparse
import shlex
import sys
from pathlib import Path

from data.errors import Fault, StorageError
from launch.exit_status import exit_at_once
from launch.presets import add_config_arguments, load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat pretrain`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train; the summary goes to standard output."""
    config = load_config(arguments.config, arguments.overrides)
    import jax

    from launch.summary import closing
    from train.devices.processes import join_processes
    from train.loop import pretrain
    from train.stop import PREEMPTED, Stopped

    join_processes()
    try:
        finished = pretrain(config)
        if jax.process_index() == 0:
            print(closing(finished, program()))
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(f"{config.train.run_dir}: {stopped}; the same command goes on", file=sys.stderr)
        return PREEMPTED
    except (Exception, KeyboardInterrupt) as error:
        if any(name in str(error) for name in ("Gloo", "NCCL", "coordination service")):
            # Where in this program it waited for the others tells nothing.
            error = Fault(f"another process of this run cannot be reached: {str(error).splitlines()[0]}")
        # What Orbax has not written would be mourned in pages, as the process ends.
        if jax.distributed.is_initialized() or isinstance(error, StorageError):
            exit_at_once(error)
        raise
    return 0


def program() -> str:
    """What the user types to call this program again."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "ziggurat" else "ziggurat"
