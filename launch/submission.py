"""What is launched through a queue is checked first: what would end with status 2 should not wait for its turn."""

from collections.abc import Sequence
from pathlib import Path

from data.errors import InputError
from launch.presets import load_config
from train.config.config import Config


def checked(command: Sequence[str], devices: int | None = None, slices: int = 1) -> Config:
    """The config of the `pretrain` command that follows `--`.

    Args:
        command: its words.
        devices: that all processes will have, where that is known: then the mesh must fit them.
        slices: of TPUs.

    Raises:
        InputError: all that is wrong with it.
    """
    if not command or command[0] != "pretrain":
        raise InputError("what can wait in a queue is pretrain; give it after --, as in: -- pretrain --config=tiny")
    from launch.commands import parse

    _, arguments = parse(command)
    config = load_config(arguments.config, arguments.overrides)
    if devices:
        from train.devices.mesh import mesh_shape
        from train.devices.mesh_checks import mesh_problems, rule_problems

        problems = rule_problems(config.mesh)
        if not problems:
            problems = mesh_problems(
                config.resolved(config.tokenizer.vocab_size), mesh_shape(config.mesh, devices, slices)
            )
        if problems:
            raise InputError("\n".join(problems))
    return config


def put(text: str, output: str | None) -> None:
    """Write what is to be submitted to a file, or else to standard output."""
    if output is None:
        print(text, end="")
    else:
        Path(output).write_text(text)
