"""The state of training: {"step", "weights", "optimizer"}, "average" with `train.ema_decay`, and "reference".

All leaves are arrays that are created on the mesh; the average is float32 and sharded like the weights. So is the
reference, a copy of the weights that the run begins with, which no step changes; `objective.name` may need it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from model.parameters import initial_weights
from train.config.config import ResolvedConfig
from train.devices.rules import training_layout
from train.devices.xla import one_time_options

State = dict[str, Any]
# A nested dictionary of arrays by parameter name: weights, gradients, updates or moments.
Weights = dict[str, Any]


def make_state(config: ResolvedConfig, optimizer: optax.GradientTransformation) -> State:
    """Returns the state before the first step on the ambient mesh, with the same bits on every mesh of a platform."""
    return state_maker(config, optimizer)()


def state_maker(config: ResolvedConfig, optimizer: optax.GradientTransformation) -> Callable[[], State]:
    """Returns the compiled program of `make_state`, which can be called again."""
    return jax.jit(lambda: _state(config, optimizer), compiler_options=one_time_options())


def abstract_state(config: ResolvedConfig, optimizer: optax.GradientTransformation) -> State:
    """Returns the shapes, dtypes and shardings of `make_state`, without allocating memory."""
    return _abstract(lambda: _state(config, optimizer))


def abstract_weights(config: ResolvedConfig) -> Weights:
    """Returns the shapes, dtypes and shardings of the weights on the ambient mesh, without allocating memory."""
    return _abstract(lambda: initial_weights(config.model, config.train.seed, training_layout(config.mesh)))


def _abstract(make: Callable[[], Any]) -> Any:
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, jax.eval_shape(make))


def _state(config: ResolvedConfig, optimizer: optax.GradientTransformation) -> State:
    weights = initial_weights(config.model, config.train.seed, training_layout(config.mesh))
    state = {"step": jnp.zeros((), jnp.int32), "weights": weights, "optimizer": optimizer.init(weights)}
    return state | dict.fromkeys(copies_in(config), weights)


def copies_in(config: ResolvedConfig) -> list[str]:
    """Returns the items of the state that begin as copies of the weights."""
    kept = {"average": config.train.ema_decay > 0, "reference": config.objective.uses_reference}
    return [name for name, is_kept in kept.items() if is_kept]
