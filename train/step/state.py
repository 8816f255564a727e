"""The state of training: {"step", "weights", "optimizer"} and, where weights are averaged, "average".

All are arrays, made in place on the mesh; the average is float32 and in shards as the weights are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from model.parameters import initial_weights
from train.config.config import Config
from train.devices.rules import training_layout

State = dict[str, Any]


def make_state(config: Config, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step; the same bits on every mesh of a platform. Call it under the run's mesh."""
    return jax.jit(lambda: _state(config, optimizer))()


def abstract_state(config: Config, optimizer: optax.GradientTransformation) -> State:
    """Shapes, dtypes and shardings of `make_state`, without memory."""
    mesh = jax.sharding.get_mesh()

    def concrete(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(concrete, jax.eval_shape(lambda: _state(config, optimizer)))


def evaluated_weights(state: State) -> Any:
    """What is evaluated, sampled from and exported: the average of the weights where there is one."""
    return state.get("average", state["weights"])


def _state(config: Config, optimizer: optax.GradientTransformation) -> State:
    weights = initial_weights(config.model, config.train.seed, training_layout(config.mesh))
    state = {"step": jnp.zeros((), jnp.int32), "weights": weights, "optimizer": optimizer.init(weights)}
    return state | ({"average": weights} if config.train.ema_decay else {})


Weights = dict[str, Any]
