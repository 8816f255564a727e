"""Loads weights of a run, a checkpoint or an export."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from data.config import DataConfig
from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from model.parameters import parameter_table
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import Config, ResolvedConfig
from train.config.run_config import MeshConfig
from train.devices.mesh import check_sharing
from train.run.folder import Run
from train.run.run_name import split_name
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state
from train.weights.huggingface import Weights, in_memory, is_export, open_huggingface, write_huggingface
from train.weights.model_card import model_card


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

    config: ResolvedConfig
    weights: Any
    tokenizer: Tokenizer
    run: Run | None = None
    step: int | None = None


def load_trained(where: str) -> Trained:
    """Load a RUN, RUN@STEP or a folder of exported WEIGHTS onto the ambient mesh.

    Its config says float32 compute and no mesh, whatever the run trained in: a run and its export give the same figures
    and text.

    Raises:
        InputError: nothing there, or damaged, or the mesh cannot share the model.
    """
    folder, step = split_name(where)
    if is_export(folder):
        opened = open_weights(where)
        data = DataConfig(segment_length=opened.context)
        config = Config(model=opened.config, data=data).resolved()
        check_sharing(config.model)
        abstract = abstract_state(config, make_optimizer(config))["weights"]
        weights = jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), in_memory(opened), abstract)
        return Trained(config, weights, opened.tokenizer)
    run, config, tokenizer = saved_run(folder)
    check_sharing(config.model)
    checkpoints = Checkpoints(run.checkpoints)
    abstract = abstract_state(config, make_optimizer(config))["weights"]
    found, weights = checkpoints.restore_weights(abstract, step)
    checkpoints.close()
    return Trained(config, weights, tokenizer, run, found)


def open_weights(where: str) -> Weights:
    """The weights of a RUN, RUN@STEP or a folder of WEIGHTS as they lie there: see `train.weights.huggingface.Weights`.

    Raises:
        InputError: nothing there, or damaged.
    """
    folder, step = split_name(where)
    if is_export(folder):
        if step is not None:
            raise InputError(f"{where}: exported weights have no steps; leave out @{step}")
        return open_huggingface(folder)
    run, config, tokenizer = saved_run(folder)
    checkpoints = Checkpoints(run.checkpoints)
    found, read = checkpoints.open_weights(parameter_table(config.model), step)
    checkpoints.close()
    return Weights(config.model, config.data.segment_length, tokenizer, read, found)


def run_of(where: str) -> Run | None:
    """The run of a RUN or RUN@STEP; none: they are exported weights."""
    folder, _ = split_name(where)
    return None if is_export(folder) else Run.load(folder)[0]


def saved_run(folder: Path) -> tuple[Run, ResolvedConfig, Tokenizer]:
    """(run, resolved settings for its use after training, tokenizer) of a run that has a checkpoint."""
    run, config = Run.load(folder)
    if run.last_step() is None:
        raise InputError(f"{folder} has no checkpoint yet; let its `ziggurat pretrain` go on to the first one")
    tokenizer = load_tokenizer(run.tokenizer)
    config = config.resolved(tokenizer.vocab_size)
    model = dataclasses.replace(config.model, compute_dtype="float32", attention_kernel="auto")
    return run, dataclasses.replace(config, model=model, mesh=MeshConfig()), tokenizer


def export_run(run: Run, config: ResolvedConfig, checkpoints: Checkpoints, tokenizer: Tokenizer, step: int) -> None:
    """Write the weights of a checkpoint for inference; they are read from there, not gathered from the devices."""
    _, read = checkpoints.open_weights(parameter_table(config.model), step)
    weights = Weights(config.model, config.data.segment_length, tokenizer, read, step)
    write_huggingface(run.export, weights, card=model_card(weights, run))
