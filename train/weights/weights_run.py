"""Writes a run whose only checkpoint is that of step 0, with weights alone: imported or merged ones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data.files.atomic import atomic_folder
from data.tokenizer.folder import write_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import CheckpointConfig, Config
from train.devices.mesh import one_device_mesh
from train.run.folder import Run


def write_weights_run(
    to: Path,
    config: Config,
    tokenizer: Tokenizer,
    make_weights: Callable[[], Mapping[str, Any]],
    add: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Writes a new run, whole or not at all. Raises InputError if the folder exists, and what the functions raise.

    Args:
        make_weights: returns the weights, nested; called once the folder is known to be new.
        add: writes other files of the run to its folder.
    """
    with atomic_folder(to) as partial, jax.set_mesh(one_device_mesh()):
        run = Run(partial)
        run.save_config(config)
        write_tokenizer(tokenizer.files(), run.tokenizer)
        add(run)
        checkpoints = Checkpoints(run.checkpoints, CheckpointConfig())
        checkpoints.save({"step": 0, "weights": jax.tree.map(jnp.asarray, make_weights())}, {})
        checkpoints.wait()
        checkpoints.close()
    return Run(to)
