"""What a start begins with: the run's newest checkpoint, that of another run, or new weights."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.mixture import initial_positions
from train.checkpoint.checkpoint import Checkpoints
from train.data_identity import Prepared, go_on
from train.fork import fork_fields, parent_of
from train.run.folder import Run
from train.step.state import State, abstract_state, make_state


@dataclass(frozen=True)
class Begun:
    """What `begin` finds or makes.

    Attributes:
        prepared: what the run stands on; where the data has changed, with what is held out of it now.
        state: on the ambient mesh.
        positions: where in the data it goes on: see `data.mixture.initial_positions`.
        over: whether the data has been read to its end.
        history: of the last steps' losses, with which the next ones are compared.
        fields: what its `start` event says of it.
    """

    prepared: Prepared
    state: State
    positions: np.ndarray
    over: bool = False
    history: list[list[float]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)


def begin(prepared: Prepared, run: Run, checkpoints: Checkpoints, optimizer: optax.GradientTransformation) -> Begun:
    """What training goes on from. All processes call it together.

    Raises:
        InputError: all checkpoints are damaged, or the data is not what was trained on (see `go_on`).
    """
    config = prepared.config
    if restored := checkpoints.restore(abstract_state(config, optimizer)):
        state, progress = restored
        return _there(state, progress, *go_on(progress, prepared, run.folder), {})
    if config.train.init_from:
        return _fork(prepared, optimizer)
    return Begun(prepared, make_state(config, optimizer), _first(prepared))


def _first(prepared: Prepared) -> np.ndarray:
    return initial_positions(prepared.mixture, prepared.config.data.num_streams)


def _there(
    state: State, progress: dict[str, Any], prepared: Prepared, positions: np.ndarray, fields: dict[str, Any]
) -> Begun:
    if progress["identity"] != prepared.identity:
        # There is more to read, and other losses are usual.
        return Begun(prepared, state, positions, fields=fields)
    return Begun(prepared, state, positions, progress["is_over"], progress.get("history", []), fields)


def _fork(prepared: Prepared, optimizer: optax.GradientTransformation) -> Begun:
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
            return Begun(prepared, state, _first(prepared), fields=fields)
        state, progress = checkpoints.restore_step(parent.step, abstract)
    finally:
        checkpoints.close()
    if take == "optimizer":
        return Begun(prepared, state, _first(prepared), fields=fields)
    found = go_on(progress, prepared, parent.run.folder, "read it from its beginning with train.init_with=optimizer")
    return _there(state, progress, *found, fields)
