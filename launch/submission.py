"""Commands that wait in a queue are checked before they are submitted: the user's errors should not wait there."""

from collections.abc import Sequence
from pathlib import Path

from data.config import NO_CORPUS
from data.errors import InputError
from data.files.atomic import atomic_file
from launch.arguments import check_output
from launch.commands import parse
from launch.presets import load_config
from train.config.config import Config


def check_command(command: Sequence[str], devices: int | None = None, slices: int = 1) -> Config:
    """Returns the config of the `pretrain` command that follows `--`. Raises InputError with all that is wrong with it.

    The mesh must fit `devices`, the number over all processes, where it is known.
    """
    if not command or command[0] != "pretrain":
        raise InputError("what can wait in a queue is pretrain; give it after --, as in: -- pretrain --config=tiny")
    _, arguments = parse(command)
    config = load_config(arguments.config, arguments.overrides)
    if config.data.corpus is None:
        raise InputError(NO_CORPUS)
    if devices:
        from train.devices.mesh import mesh_shape
        from train.devices.mesh_checks import mesh_problems, rule_problems

        problems = rule_problems(config.mesh)
        if not problems:
            shape = mesh_shape(config.mesh, devices, slices)
            problems = mesh_problems(config.resolved(config.tokenizer.vocab_size), shape)
        if problems:
            raise InputError("\n".join(problems))
    return config


def write_submission(text: str, output: Path | None, made_by: str) -> None:
    """Writes a text with the line `made_by` to standard output, or to a file that is new or has that line, too."""
    if output is None:
        print(text, end="")
        return
    check_output(output, "--output", made_by, f"file that begins with the line {made_by}")
    with atomic_file(output) as partial:
        partial.write_text(text)
