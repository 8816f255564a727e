"""Imports weights as a run whose only checkpoint is that of step 0, with weights alone."""

import dataclasses
from pathlib import Path

import jax

from data.config import DataConfig
from data.errors import InputError
from data.files.atomic import atomic_folder, check_new
from data.tokenizer.folder import write_tokenizer
from model.config import ModelConfig
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import CheckpointConfig, Config
from train.config.run_config import TrainConfig
from train.devices.mesh import one_device_mesh
from train.run.folder import Run
from train.run.storage import check_place
from train.weights.huggingface import open_huggingface
from train.weights.upcycling import mixture_config, mixture_weights


def import_weights(folder: Path, to: Path, experts: tuple[int, int] | None = None) -> Run:
    """Makes a run from a folder's weights, all in memory at once, atomically. InputError as `open_huggingface`.

    Args:
        experts: the copies of each feed-forward in a mixture, and how many of them compute a token.
    """
    check_new(to)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give one with config.json and safetensors")
    weights = open_huggingface(folder)
    to = to.resolve()
    check_place(Run(to).checkpoints)
    # Training computes in the default dtype; evaluation and generation set float32 themselves.
    model: ModelConfig = dataclasses.replace(weights.config, compute_dtype=ModelConfig.compute_dtype)
    if experts:
        model = mixture_config(model, *experts)
    arrays = weights.in_memory()
    if experts:
        arrays = mixture_weights(model, arrays)
    data = DataConfig(segment_length=weights.context)
    with atomic_folder(to) as partial, jax.set_mesh(one_device_mesh()):
        run = Run(partial)
        run.save_config(Config(model=model, data=data, train=TrainConfig(run_dir=str(to))))
        write_tokenizer(weights.tokenizer.files(), run.tokenizer)
        checkpoints = Checkpoints(run.checkpoints, CheckpointConfig())
        checkpoints.save({"step": 0, "weights": jax.tree.map(jax.numpy.asarray, arrays)}, {})
        checkpoints.wait()
        checkpoints.close()
    return Run(to)
