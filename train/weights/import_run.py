"""Imports weights as a run whose only checkpoint is that of step 0, with weights alone."""

import dataclasses
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.errors import InputError
from data.files.atomic import check_new
from model.config import ModelConfig
from train.config.config import Config
from train.config.objective_config import ObjectiveConfig
from train.config.run_config import TrainConfig
from train.run.folder import Run
from train.run.storage import check_place
from train.weights.huggingface import open_huggingface
from train.weights.upcycling import mixture_config, mixture_weights
from train.weights.weights_run import write_weights_run


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
    # The chunk of the loss follows from the vocabulary, and has no effect in a reward model that begins with these.
    model: ModelConfig = dataclasses.replace(weights.config, compute_dtype=ModelConfig.compute_dtype, loss_chunk=None)
    if experts:
        model = mixture_config(model, *experts)

    def make_weights() -> dict[str, Any]:
        arrays = weights.in_memory()
        return mixture_weights(model, arrays) if experts else arrays

    data = DataConfig(segment_length=weights.context)
    objective = ObjectiveConfig(name="reward" if model.reward_head else "next_token")
    config = Config(model=model, data=data, objective=objective, train=TrainConfig(run_dir=str(to)))
    return write_weights_run(to, config, weights.tokenizer, make_weights)
