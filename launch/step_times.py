"""Asks a process of its own, which leaves the devices to the runs that follow: do configs fit, how long is a step?"""

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
    remedy = "if memory is full, as the kernel's log may tell, make what it timed smaller; else start again"
    return dict(answer("steps_in_turns", configs, remedy))


def check_devices(configs: Mapping[str, Config]) -> None:
    """Raises InputError with all configs that do not fit the devices."""
    answer("check_meshes", configs, "start again")


def answer(question: str, configs: Mapping[str, Config], remedy: str) -> Any:
    """Returns what a function of `train.planning.this_machine` answers about the configs in a process of its own."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=send_answer, args=(sender, question, configs))
    process.start()
    sender.close()
    try:
        found: Any = receiver.recv()
    except EOFError:
        process.join()
        raise Fault(f"the process of {question} ended with status {process.exitcode}; {remedy}") from None
    process.join()
    if isinstance(found, InputError):
        raise found
    return found


def send_answer(sender: Connection, question: str, configs: Mapping[str, Config]) -> None:
    """Sends the answer of this process, or what is wrong with the configs."""
    from train.planning import this_machine

    logging.basicConfig(format="%(message)s")
    try:
        resolved = {name: c.resolved(c.tokenizer.vocab_size) for name, c in configs.items()}
        sender.send(getattr(this_machine, question)(resolved))
    except InputError as error:
        sender.send(error)
