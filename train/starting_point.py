"""The starting point of training: the run's newest checkpoint, a checkpoint of another run, or new weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.mixture import initial_positions
from train.checkpoint.checkpoint import Checkpoints
from train.data_identity import ANOTHER_RUN, RunInputs, continue_data
from train.fork import Parent, gets_head, parent_of
from train.run.folder import Run
from train.step.state import State, abstract_state, abstract_weights, copies_in, make_state


@dataclass(frozen=True)
class StartingPoint:
    """A state to train from, on the ambient mesh, and its place in the data."""

    inputs: RunInputs  # with new held-out documents if the data has changed
    state: State
    positions: np.ndarray  # of all streams (see `data.mixture.initial_positions`)
    is_over: bool = False  # true if the data has been read to its end
    history: list[list[float]] = field(default_factory=list)  # (loss, number of tokens) of the last steps
    fields: dict[str, Any] = field(default_factory=dict)  # of the `start` event


def find_starting_point(
    inputs: RunInputs, run: Run, checkpoints: Checkpoints, optimizer: optax.GradientTransformation
) -> StartingPoint:
    """Restores or makes the state to train from, on all processes. InputError as `restore` and `continue_data`."""
    config = inputs.config
    if restored := checkpoints.restore(abstract_state(config, optimizer)):
        return _at_checkpoint(inputs, *restored, run.folder)
    if config.train.init_from:
        parent = parent_of(config)
        origin = {"run": str(parent.run.folder.resolve()), "step": parent.step, "with": config.train.init_with}
        return replace(_fork(inputs, parent, optimizer), fields={"fork": origin})
    positions = initial_positions(inputs.mixture, config.data.num_streams)
    return StartingPoint(inputs, make_state(config, optimizer), positions)


def _at_checkpoint(
    inputs: RunInputs, state: State, progress: dict[str, Any], folder: Path, instead: str = ANOTHER_RUN
) -> StartingPoint:
    now, positions = continue_data(progress, inputs, folder, instead)
    if progress["identity"] != inputs.identity:
        # The data has changed: there is more to read, and the losses before do not apply.
        return StartingPoint(now, state, positions)
    return StartingPoint(now, state, positions, progress["is_over"], progress.get("history", []))


def _fork(inputs: RunInputs, parent: Parent, optimizer: optax.GradientTransformation) -> StartingPoint:
    """Starts from a checkpoint of another run (see `train.fork`)."""
    config = inputs.config
    abstract = abstract_state(config, optimizer)
    checkpoints = Checkpoints(parent.run.checkpoints)
    try:
        if config.train.init_with == "weights":
            state = make_state(config, optimizer)
            head = state["weights"].get("unembedding")
            for name in ("weights", *copies_in(config)):
                del state[name]  # so that two sets of weights do not exist at once
            if gets_head(config, parent):
                language = replace(config, model=parent.config.resolved(config.model.vocab_size).model)
                weights = checkpoints.restore_weights(abstract_weights(language), parent.step)[1]
                state["weights"] = weights | {"unembedding": head}
            else:
                state["weights"] = checkpoints.restore_weights(abstract["weights"], parent.step)[1]
            state |= {name: jax.tree.map(jnp.copy, state["weights"]) for name in copies_in(config)}
        else:
            state, progress = checkpoints.restore_step(parent.step, abstract)
    finally:
        checkpoints.close()
    if config.train.init_with == "all":
        remedy = "read it from its beginning with train.init_with=optimizer"
        return _at_checkpoint(inputs, state, progress, parent.run.folder, remedy)
    return StartingPoint(inputs, state, initial_positions(inputs.mixture, config.data.num_streams))
