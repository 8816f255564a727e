"""Pretrain a model from raw text. The same command again resumes the run in train.run_dir."""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from data.errors import Fault, StorageError
from launch.exit_status import exit_at_once
from launch.memory import SHORT_RUN, memory_for, start_again
from launch.presets import add_config_arguments, load_config

# What XLA reports where a peer has ended or cannot be reached: Gloo on CPUs, NCCL on GPUs, the coordination service on
# all. Their other errors are this process's own.
LOST_PEER = re.compile(
    r"Gloo.*(closed|reset|broken pipe|connect|time|read error)"
    r"|NCCL.*(remote process exited|unhandled system error|connection)"
    r"|coordination service",
    re.IGNORECASE | re.DOTALL,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat pretrain`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains the model and prints a summary."""
    config = load_config(arguments.config, arguments.overrides)
    if os.environ.get("GLIBC_TUNABLES") == SHORT_RUN != memory_for(config):
        start_again(memory_for(config))
    import jax

    from launch.summary import summary
    from train.devices.processes import join_processes
    from train.loop import pretrain
    from train.stop import PREEMPTED, Stopped

    join_processes()
    try:
        finished = pretrain(config)
        if jax.process_index() == 0:
            called = Path(sys.argv[0])
            print(summary(finished, shlex.quote(str(called)) if called.name == "ziggurat" else "ziggurat"))
    except Stopped as stopped:
        if jax.process_index() == 0:
            print(f"{config.train.run_dir}: {stopped}; the same command resumes the run", file=sys.stderr)
        return PREEMPTED
    except (Exception, KeyboardInterrupt) as error:
        if message := lost_peer(error):
            # The traceback would only show where this process happened to wait.
            error = Fault(f"another process of this run cannot be reached: {message}")
        # Orbax's atexit handlers would print pages about unfinished writes.
        if jax.distributed.is_initialized() or isinstance(error, StorageError):
            exit_at_once(error)
        raise
    return 0


def lost_peer(error: BaseException | None) -> str:
    """Returns the first line of XLA's error about a lost peer that caused this error; empty where there is none."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST_PEER.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""
