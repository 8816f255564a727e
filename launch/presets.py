"""Loads the config that a command line names: a preset, a Python file or a run, with overrides of fields."""

import argparse
import dataclasses
import inspect
import logging
import runpy
import shlex
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from data.errors import InputError
from data.printable import printable_name
from launch.arguments import one_line
from settings import help_of, kind_of
from train.config.config import NOT_KEPT, Config, config_fields
from train.config.reading import make_config
from train.config.values import nearest
from train.run.run_name import CONFIG_FILE, read_config, split_name

PRESETS = Path(__file__).parent / "configs"
# Fields that run commands or code, or send a run's figures elsewhere. A run's folder is data that may come from
# somebody else, so they are never taken from there.
ASKED_FOR = ("train.on_event", "train.wandb", "evaluation.tasks", "evaluation.task_dir", "objective.reward")
MAX_ERROR = 2000  # characters of an error that are shown
log = logging.getLogger("ziggurat")


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds `--config=NAME|FILE|RUN`, and `--config.GROUP.FIELD=VALUE` for every field, collected in `overrides`."""
    help = f"one of {', '.join(presets())}, a file, a run's folder, or RUN@STEP to begin another run with that"
    parser.add_argument("--config", required=required, type=one_line, metavar="NAME|FILE|RUN", help=help)
    parser.set_defaults(overrides={})
    groups = {}
    for group in dataclasses.fields(Config):
        introduction = (inspect.getdoc(cast(type, group.type)) or "").partition("\n")[0]
        groups[group.name] = parser.add_argument_group(f"fields of {group.name}", introduction)
    for group_name, name, field in config_fields():
        flag = f"--config.{group_name}.{name}"
        help = help_of(field).replace("%", "%%")
        groups[group_name].add_argument(flag, action=Override, metavar=kind_of(field), help=help)


class Override(argparse.Action):
    """Collects the values of fields by their names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        assert option is not None
        namespace.overrides = namespace.overrides | {option.removeprefix("--config."): values}


def presets() -> list[str]:
    """Returns the names of all presets."""
    return sorted(file.stem for file in PRESETS.glob("[!_]*.py"))


def load_config(name: str, overrides: Mapping[str, str]) -> Config:
    """Loads a config from a preset, a Python file that defines `get_config() -> ConfigDict`, or a run.

    RUN is a run as it was last started, wherever its folder is now; RUN@STEP is a fork of it (see `train.fork`).
    Overrides are by "group.field". Raises InputError with all wrong values, or where the config or its file fails.
    """
    if name not in presets() and not name.endswith(".py"):
        folder, step = split_name(name)
        if folder.is_dir():
            return make_config(run_values(folder, step, overrides), overrides)
    file = PRESETS / f"{name}.py" if name in presets() else Path(name)
    if not (file.suffix == ".py" and file.is_file()):
        problem = "there is no such file" if file.suffix == ".py" else "no preset, run or file that ends in .py"
        raise InputError(f"--config={name}: {problem}; presets: {', '.join(presets())}{nearest(name, presets())}")
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
        made = get_config() if get_config else None
        values = made.to_dict() if isinstance(made, ConfigDict) else None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own file raises, sys.exit() included
        raise InputError(problem_of_file(file, error)) from None
    if get_config is None:
        raise InputError(f"{file}: it must define get_config() that returns a ConfigDict")
    if not isinstance(values, dict):
        raise InputError(f"{file}: get_config() returns {type(made).__name__}; it must return a ConfigDict")
    return make_config(values, overrides)


def problem_of_file(file: Path, error: BaseException) -> str:
    """Returns one line with the line of a user's file that raised an error, and its type and text."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and not lines:  # of the file itself
        return f"{file}:{error.lineno or 1}: {error.msg}"
    try:
        text = str(error)
    except BaseException:  # whatever the error's own class raises
        text = "its text cannot be shown"
    text = printable_name(" ".join(f"{type(error).__name__}: {text}".split()))
    return f"{file}:{lines[-1] if lines else 1}: {text[:MAX_ERROR]}{'…' * (len(text) > MAX_ERROR)}"


def run_values(folder: Path, step: int | None, overrides: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the settings of a run, or of a fork that starts from its checkpoint of a step.

    Logs which fields of ASKED_FOR the run has had and this one has not, as they are not in `overrides`.
    """
    values = dataclasses.asdict(read_config(folder))
    for name in ASKED_FOR:
        group, field = name.split(".")
        value, values[group][field] = values[group][field], None
        if value and name not in overrides:
            flag = f"--config.{name}={'COMMAND' if value == NOT_KEPT else shlex.quote(value)}"
            log.warning("%s: what runs code or sends figures is not taken from a run's folder; to have it: %s",
                        folder / CONFIG_FILE, flag)  # fmt: skip
    values["data"]["accept_changes"] = False
    values["train"]["run_dir"] = str(folder)
    if step is not None:
        # Step 0 is a checkpoint of imported or merged weights, which has nothing else.
        values["train"] |= {"init_from": f"{folder}@{step}", "init_with": "all" if step else "weights"}
        values["checkpoint"]["dir"] = None
    return values
