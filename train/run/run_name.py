"""Names of runs, RUN or RUN@STEP, and the config that a run has saved. Works without JAX."""

import os
from pathlib import Path

from data.errors import InputError
from data.files.json_file import read_json
from train.config.config import Config
from train.config.reading import make_config

CONFIG_FILE = "config.json"


def split_name(name: str) -> tuple[Path, int | None]:
    """Splits RUN or RUN@STEP into (folder, step or None); a folder may contain an @. InputError if STEP is no step."""
    name = os.path.expanduser(name)
    if "@" not in name or os.path.exists(name):
        return Path(name), None
    folder, _, step = name.rpartition("@")
    if not (step.isascii() and step.isdigit()):
        raise InputError(f"{name}: after @ comes the step of a checkpoint, a whole number")
    return Path(folder), int(step)


def read_config(folder: Path) -> Config:
    """Reads a run's config. Raises InputError if the folder is not a run, or its config is damaged."""
    file = folder / CONFIG_FILE
    if not folder.exists():
        raise InputError(f"{folder}: there is no such folder; give a run's folder or exported weights")
    if not os.path.lexists(file):
        raise InputError(f"{folder} has no config.json: it is neither a run nor exported weights")
    values = read_json(file)
    try:
        return make_config(values)
    except InputError as error:
        lines = "\n".join(f"  {line}" for line in str(error).splitlines())
        raise InputError(f"{file} is not the config of a run of this version:\n{lines}") from None
