"""Loads the weights of a run, a checkpoint or an export, and exports those of a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data.config import DataConfig
from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from model.config import ModelConfig
from model.parameters import parameter_table
from model.trees import flattened
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import Config, ResolvedConfig
from train.config.run_config import MeshConfig
from train.devices.mesh import check_sharing
from train.run.folder import Run
from train.run.run_name import split_name
from train.step.state import abstract_weights
from train.weights.huggingface import is_export, open_huggingface, write_huggingface
from train.weights.model_card import model_card
from train.weights.weight_source import WeightSource


class Trained(NamedTuple):
    """A model ready for use, from a run or from exported weights, which have no `run` and `step`."""

    config: ResolvedConfig  # for exported weights only the model and the segment length are not defaults
    weights: Any  # nested, on the ambient mesh
    tokenizer: Tokenizer
    run: Run | None = None
    step: int | None = None


def check_predicts(config: ModelConfig, where: str | Path) -> None:
    """Raises InputError if the model is a reward model, which predicts no tokens."""
    if config.reward_head:
        raise InputError(f"{where} is a reward model, which scores answers and predicts no tokens; name another model")


def load_trained(where: str, predicts: bool = True) -> Trained:
    """Loads a RUN, RUN@STEP or a folder of exported WEIGHTS onto the ambient mesh.

    The config is set to float32 compute and no mesh, so that a run and its export give the same figures and text.

    Args:
        predicts: the model must predict tokens, which a reward model does not.

    Raises:
        InputError: there is nothing, it is damaged, it does not predict, or the mesh cannot share the model.
    """
    folder, step = split_name(where)
    if is_export(folder):
        opened = open_weights(where)
        if predicts:
            check_predicts(opened.config, where)
        config = Config(model=opened.config, data=DataConfig(segment_length=opened.context)).resolved()
        check_sharing(config.model)
        shardings = jax.tree.map(lambda array: array.sharding, abstract_weights(config))
        return Trained(config, jax.device_put(opened.in_memory(), shardings), opened.tokenizer)
    run, config, tokenizer = open_run(folder)
    if predicts:
        check_predicts(config.model, where)
    check_sharing(config.model)
    checkpoints = Checkpoints(run.checkpoints)
    step, weights = checkpoints.restore_weights(abstract_weights(config), step)
    check_tokenizer(tokenizer, checkpoints.progress(step))
    checkpoints.close()
    for name, array in flattened(weights).items():
        if not jnp.isfinite(array).all():
            raise InputError(f"{run.checkpoints}: step {step}: {name} has NaN or infinite values; take another step")
    return Trained(config, weights, tokenizer, run, step)


def open_weights(where: str) -> WeightSource:
    """Opens the weights of a RUN, RUN@STEP or folder, to be read on demand. InputError if they are damaged."""
    folder, step = split_name(where)
    if is_export(folder):
        if step is not None:
            raise InputError(f"{where}: exported weights have no steps; leave out @{step}")
        return open_huggingface(folder)
    run, config, tokenizer = open_run(folder)
    checkpoints = Checkpoints(run.checkpoints)
    step, read = checkpoints.open_weights(parameter_table(config.model), step)
    check_tokenizer(tokenizer, checkpoints.progress(step))
    checkpoints.close()
    return WeightSource(config.model, config.data.segment_length, tokenizer, read, step, config.data.converses)


def run_of(where: str) -> Run | None:
    """Returns the run of a RUN or RUN@STEP, or None for exported weights."""
    folder, _ = split_name(where)
    return None if is_export(folder) else Run.load(folder)[0]


def open_run(folder: Path) -> tuple[Run, ResolvedConfig, Tokenizer]:
    """Returns (run, resolved settings for use after training, tokenizer) of a run that has a checkpoint."""
    run, config = Run.load(folder)
    if run.last_step() is None:
        raise InputError(f"{folder} has no checkpoint yet; let its `ziggurat pretrain` reach the first one")
    tokenizer = load_tokenizer(run.tokenizer)
    config = config.resolved(tokenizer.vocab_size)
    model = dataclasses.replace(config.model, compute_dtype="float32", attention_kernel="auto", matmul_dtype=None)
    return run, dataclasses.replace(config, model=model, mesh=MeshConfig()), tokenizer


def check_tokenizer(tokenizer: Tokenizer, progress: Mapping[str, Any]) -> None:
    """Raises InputError if a run's tokenizer is not the one with which the checkpoint of this progress was trained."""
    # Imported weights have no progress.
    if progress.get("identity", {}).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise InputError(
            f"{tokenizer.folder} is not the tokenizer that the run was trained with; restore it from a copy"
        )


def export_run(run: Run, config: ResolvedConfig, checkpoints: Checkpoints, tokenizer: Tokenizer, step: int) -> None:
    """Exports a checkpoint for inference; weights are read from the checkpoint, not gathered from devices."""
    _, read = checkpoints.open_weights(parameter_table(config.model), step)
    weights = WeightSource(config.model, config.data.segment_length, tokenizer, read, step, config.data.converses)
    write_huggingface(run.export, weights, card=model_card(weights, run))
