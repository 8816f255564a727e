"""What a person names as RUN or RUN@STEP, and the settings that a run has saved. It does without JAX."""

import json
import os
from pathlib import Path

from data.errors import InputError
from train.config.config import Config
from train.config.reading import make_config

CONFIG_FILE = "config.json"


def split_name(where: str) -> tuple[Path, int | None]:
    """(folder, step or none) of RUN or RUN@STEP; the name of a folder may itself hold an @.

    Raises:
        InputError: what stands after the @ is no step.
    """
    where = os.path.expanduser(where)
    if "@" not in where or os.path.exists(where):
        return Path(where), None
    folder, _, step = where.rpartition("@")
    if not (step.isascii() and step.isdigit()):
        raise InputError(f"{where}: after @ comes the step of a checkpoint, a whole number")
    return Path(folder), int(step)


def read_config(folder: Path) -> Config:
    """A run's settings. InputError where the folder is no run or its config is damaged."""
    file = folder / CONFIG_FILE
    if not folder.exists():
        raise InputError(f"{folder}: there is no such folder; give a run's folder or exported weights")
    if not file.is_file():
        raise InputError(f"{folder} has no config.json: it is neither a run nor exported weights")
    try:
        values = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds no settings")
    try:
        return make_config(values)
    except InputError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise InputError(f"{file} is not the config of a run of this version:\n{lines}") from None
