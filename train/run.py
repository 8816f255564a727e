"""A run's folder: config.json, tokenizer/, checkpoints/, metrics.jsonl, and the documents that it holds out."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from data.config import DataConfig
from data.errors import InputError
from data.tokenizer import Tokenizer
from train.checkpoint import Checkpoints
from train.config import Config, from_dict, to_json
from train.optimizer import make_optimizer
from train.state import abstract_state
from train.weights import read_huggingface


@dataclass(frozen=True)
class Run:
    """The paths of a run's folder."""

    folder: Path

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.folder / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The run's own tokenizer, or its copy."""
        return self.folder / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Orbax's folder."""
        return self.folder / "checkpoints"

    @property
    def snapshot(self) -> Path:
        """The default corpus as it was when the run began."""
        return self.folder / "corpus" / "stdlib.jsonl"

    @property
    def held_out(self) -> Path:
        """The documents that the run evaluates on, so that its folder is enough to evaluate it."""
        return self.folder / "held_out.jsonl"

    @property
    def export(self) -> Path:
        """Weights for inference, written at the end."""
        return self.folder / "export"

    def names(self) -> set[str]:
        """What a run may have in its folder before its config is saved."""
        return {path.name for path in (self.tokenizer, self.checkpoints, self.snapshot.parent, self.held_out)}

    def clear(self) -> None:
        """Remove what depends on settings."""
        shutil.rmtree(self.tokenizer, ignore_errors=True)
        self.held_out.unlink(missing_ok=True)

    def save_config(self, config: Config) -> None:
        """Write config.json at once."""
        write_atomically(self.config_file, to_json(config))

    def load_config(self) -> Config:
        """The run's settings. InputError where the folder is no run or its config is damaged."""
        if not self.folder.exists():
            raise InputError(f"{self.folder}: there is no such folder; give a run's folder or exported weights")
        if not self.config_file.is_file():
            raise InputError(f"{self.folder} has no config.json: it is neither a run nor exported weights")
        try:
            values = json.loads(self.config_file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.config_file}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise InputError(f"{self.config_file}: holds no settings")
        return from_dict(values)

    def held_out_texts(self) -> list[str]:
        """The documents of `held_out`."""
        if not self.held_out.is_file():
            return []
        return [json.loads(line)["text"] for line in self.held_out.read_text().splitlines()]

    def save_held_out(self, texts: list[str]) -> None:
        """Keep these documents with the run."""
        write_atomically(self.held_out, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


@dataclass(frozen=True)
class Trained:
    """A model ready for use: what `evaluate`, `generate` and `export` need of a run or of exported weights.

    Attributes:
        config: resolved; of exported weights it says the model and the segment length, the rest are defaults.
        weights: nested dictionary, on the ambient mesh.
        tokenizer: its tokenizer.
        run: its folder, where it is a run.
        step: of the checkpoint, where it is a run.
    """

    config: Config
    weights: Any
    tokenizer: Tokenizer
    run: Run | None = None
    step: int | None = None


def load_trained(where: str) -> Trained:
    """Load a RUN, RUN@STEP or a folder of exported WEIGHTS onto the ambient mesh.

    Raises:
        InputError: nothing there, or damaged.
    """
    path, _, step = where.partition("@")
    folder = Path(path)
    if (folder / "model.safetensors").exists():
        if step:
            raise InputError(f"{where}: exported weights have no steps; leave out @{step}")
        model, weights, tokenizer, context = read_huggingface(folder)
        config = Config(model=model, data=DataConfig(segment_length=context)).resolved()
        return Trained(config, jax.tree.map(jax.numpy.asarray, weights), tokenizer)
    if step and not step.isdigit():
        raise InputError(f"{where}: after @ comes the step of a checkpoint, a whole number")
    run = Run(folder)
    config = run.load_config()
    if not run.checkpoints.is_dir():
        raise InputError(f"{folder} has no checkpoint yet; let its `ziggurat pretrain` go on to the first one")
    tokenizer = Tokenizer.load(run.tokenizer)
    config = config.resolved(tokenizer.vocab_size)
    checkpoints = Checkpoints(run.checkpoints)
    abstract = abstract_state(config, make_optimizer(config))["weights"]
    found, weights = checkpoints.restore_weights(abstract, int(step) if step else None)
    checkpoints.close()
    return Trained(config, weights, tokenizer, run, found)
