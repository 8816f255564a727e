"""Times the steps of several configs in a process of their own, which leaves the devices to the runs that follow."""

import logging
import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from data.errors import Fault, InputError
from launch.many_runs import say
from train.config.config import Config


def time_steps(configs: Mapping[str, Config]) -> dict[str, float]:
    """Returns the seconds of a step of each config, timed in turns. InputError with all that do not fit the devices."""
    say(f"timing a step of {', '.join(configs)}, in turns")
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=send_steps, args=(sender, configs))
    process.start()
    sender.close()
    try:
        seconds: Any = receiver.recv()
    except EOFError:
        seconds = None
    process.join()
    if isinstance(seconds, InputError):
        raise seconds
    if seconds is None:
        raise Fault(f"the process that timed the steps ended with status {process.exitcode}; start again")
    return dict(seconds)


def send_steps(sender: Connection, configs: Mapping[str, Config]) -> None:
    """Times the steps in this process, and sends them, or what is wrong with the configs."""
    from train.planning.this_machine import steps_in_turns

    logging.basicConfig(format="%(message)s")
    try:
        sender.send(steps_in_turns({name: c.resolved(c.tokenizer.vocab_size) for name, c in configs.items()}))
    except InputError as error:
        sender.send(error)
