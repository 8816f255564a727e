"""Trackers that also get the numbers of a run's steps, if the config names them: TensorBoard, Weights & Biases."""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import InputError
from train.config.config import Config, public
from train.run.events import read_events
from train.run.folder import Run

log = logging.getLogger("ziggurat")
# Field of `train` → its package, which is also named as an extra.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class TensorBoard:
    """A folder that TensorBoard shows, from the step after `step` on."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keeps the numbers of one step by name."""
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Waits until all numbers are stored; none may follow."""
        self._board.close()


class WeightsAndBiases:
    """A run of Weights & Biases, new or resumed. Raises InputError if nobody is logged in."""

    def __init__(self, project: str, run: Run, config: Config):
        import wandb

        # Standard output and error stay the run's own, and so does the command line, which may hold credentials. A
        # repository around the run's folder is not this code's.
        settings = wandb.Settings(console="off", silent=True, x_disable_meta=True, disable_git=True)
        names: dict[str, Any] = {"project": project, "name": run.folder.name, "id": run_id(run), "dir": str(run.folder)}
        try:
            self._run = wandb.init(**names, resume="allow", config=asdict(public(config)), settings=settings)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise InputError(
                f"train.wandb = {project}: {error} Or set WANDB_MODE=offline, or leave the field at none"
            ) from None
        if not self._run.offline:
            log.info("Weights & Biases: %s", self._run.url)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keeps the numbers of one step by name, unless they are there."""
        if step >= self._run.step:
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Waits until all numbers are stored; none may follow."""
        self._run.finish()


Writer = TensorBoard | WeightsAndBiases


def run_id(run: Run) -> str:
    """Returns an id that stays the same over all starts of a run: a hash of its first start."""
    first = next(event for event in read_events(run.events) if event["event"] == "start")
    return hashlib.sha256(f"{first['time']} {first.get('host')} {first.get('pid')}".encode()).hexdigest()[:12]


def missing_packages(config: Config) -> list[str]:
    """Returns one line for each tracker of the config whose package is not installed."""
    return [
        f"train.{name} needs the package {package}: pip install -e '.[{name}]'"
        for name, package in PACKAGES.items()
        if getattr(config.train, name) and importlib.util.find_spec(package) is None
    ]


def foreign_settings(config: Config, run: Run) -> list[str]:
    """Returns one line for each settings file that Weights & Biases would read in the run's folder.

    The package reads the one in the folder that the command is started in. In a run's folder that came from somebody
    else it could send the figures to any server.
    """
    here = Path.cwd()
    if not config.train.wandb or not here.is_relative_to(run.folder.resolve()):
        return []
    return [
        f"{file}: a run's folder cannot say where figures go; start from another folder, or remove it"
        for name in ("wandb", ".wandb")
        if os.path.lexists(file := here / name / "settings")
    ]


def open_writers(config: Config, run: Run, step: int) -> list[Writer]:
    """Opens the trackers of the config, to continue after `step`. The run has written its first event."""
    writers: list[Writer] = []
    if config.train.tensorboard:
        writers.append(TensorBoard(run.folder / "tensorboard", step))
    if config.train.wandb:
        writers.append(WeightsAndBiases(config.train.wandb, run, config))
    return writers
