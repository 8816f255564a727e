"""What a start begins with: the run's newest checkpoint, that of another run, or new weights."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.mixture import initial_positions
from train.checkpoint.checkpoint import Checkpoints
from train.data_identity import RunInputs, continue_data
from train.fork import fork_fields, parent_of
from train.run.folder import Run
from train.step.state import State, abstract_state, make_state


@dataclass(frozen=True)
class StartingPoint:
    """What `find_starting_point` finds or makes.

    Attributes:
        prepared: what the run stands on; where the data has changed, with what is held out of it now.
        state: on the ambient mesh.
        positions: where in the data it goes on: see `data.mixture.initial_positions`.
        over: whether the data has been read to its end.
        history: of the last steps' losses, with which the next ones are compared.
        fields: what its `start` event says of it.
    """

    prepared: RunInputs
    state: State
    positions: np.ndarray
    over: bool = False
    history: list[list[float]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


def find_starting_point(
    prepared: RunInputs, run: Run, checkpoints: Checkpoints, optimizer: optax.GradientTransformation
) -> StartingPoint:
    """What training goes on from. All processes call it together.

    Raises:
        InputError: all checkpoints are damaged, or the data is not what was trained on (see `continue_data`).
    """
    config = prepared.config
    if restored := checkpoints.restore(abstract_state(config, optimizer)):
        state, progress = restored
        return _there(state, progress, *continue_data(progress, prepared, run.folder), {})
    if config.train.init_from:
        return _fork(prepared, optimizer)
    return StartingPoint(prepared, make_state(config, optimizer), _first(prepared))


def _first(prepared: RunInputs) -> np.ndarray:
    return initial_positions(prepared.mixture, prepared.config.data.num_streams)


def _there(
    state: State, progress: dict[str, Any], prepared: RunInputs, positions: np.ndarray, fields: dict[str, Any]
) -> StartingPoint:
    if progress["identity"] != prepared.identity:
        # There is more to read, and other losses are usual.
        return StartingPoint(prepared, state, positions, fields=fields)
    return StartingPoint(prepared, state, positions, progress["is_over"], progress.get("history", []), fields)


def _fork(prepared: RunInputs, optimizer: optax.GradientTransformation) -> StartingPoint:
    """With the checkpoint of another run: see `train.fork`."""
    config = prepared.config
    parent, take, fields = parent_of(config), config.train.init_with, fork_fields(config)
    abstract, checkpoints = abstract_state(config, optimizer), Checkpoints(parent.run.checkpoints)
    try:
        if take == "weights":
            state = make_state(config, optimizer)
            # Not two sets of weights at once, where it can be helped.
            del state["weights"]
            state["weights"] = checkpoints.restore_weights(abstract["weights"], parent.step)[1]
            if "average" in state:
                state["average"] = jax.tree.map(jnp.copy, state["weights"])
            return StartingPoint(prepared, state, _first(prepared), fields=fields)
        state, progress = checkpoints.restore_step(parent.step, abstract)
    finally:
        checkpoints.close()
    if take == "optimizer":
        return StartingPoint(prepared, state, _first(prepared), fields=fields)
    found = continue_data(
        progress, prepared, parent.run.folder, "read it from its beginning with train.init_with=optimizer"
    )
    return _there(state, progress, *found, fields)
