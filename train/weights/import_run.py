"""Imports weights as a run whose only checkpoint is that of step 0, with weights alone."""

import dataclasses
from pathlib import Path

import jax

from data.config import DataConfig
from data.errors import InputError
from data.files.atomic import atomic_folder
from data.tokenizer.folder import copy_tokenizer
from model.config import ModelConfig
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import CheckpointConfig, Config
from train.config.run_config import TrainConfig
from train.devices.mesh import one_device_mesh
from train.run.folder import Run
from train.weights.huggingface import open_huggingface
from train.weights.weight_source import WeightSource


def import_weights(folder: Path, to: Path) -> Run:
    """Makes a run from a folder of weights, atomically. All weights are in memory at once.

    Raises InputError if the folder cannot be read (see `open_huggingface`), or something exists at `to`.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"--to={to} is there already; name a new folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give one with config.json and safetensors")
    weights = open_huggingface(folder)
    if weights.tokenizer.vocab_size > (weights.config.vocab_size or 0):
        raise InputError(
            f"{folder}: the tokenizer has {weights.tokenizer.vocab_size} ids, the model {weights.config.vocab_size}; "
            "give the model's own"
        )
    to = to.resolve()
    with atomic_folder(to) as partial:
        _write(weights, Run(partial), to)
    return Run(to)


def _write(weights: WeightSource, run: Run, to: Path) -> None:
    # Training computes in the default dtype; evaluation and generation set float32 themselves.
    model = dataclasses.replace(weights.config, compute_dtype=ModelConfig.compute_dtype)
    data, train = DataConfig(segment_length=weights.context), TrainConfig(run_dir=str(to))
    run.save_config(Config(model=model, data=data, train=train))
    copy_tokenizer(weights.tokenizer, run.tokenizer)
    with jax.set_mesh(one_device_mesh()):
        checkpoints = Checkpoints(run.checkpoints, CheckpointConfig())
        arrays = jax.tree.map(jax.numpy.asarray, weights.in_memory())
        checkpoints.save({"step": 0, "weights": arrays}, {})
        checkpoints.wait()
        checkpoints.close()
