"""Optimizers: the chain of transformations from gradients to updates of the weights."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from model.parameters import parameter_table
from model.trees import flattened, nested
from train.config.config import ResolvedConfig
from train.step.adafactor import scale_by_adafactor
from train.step.muon import orthogonalize
from train.step.schedule import learning_rate
from train.step.state import Weights


def make_optimizer(config: ResolvedConfig) -> optax.GradientTransformation:
    """Returns the optimizer of `optimizer.name`, with clipping by global norm and decay by the parameter table.

    - adamw: Loshchilov and Hutter 2019, arXiv:1711.05101.
    - lion: Chen et al. 2023, arXiv:2302.06675.
    - adafactor: see `adafactor.py`; the schedule is its relative step size.
    - muon: see `muon.py`, for matrices, and AdamW for all other parameters.

    The state is a dictionary by the names of the chain, so a checkpoint does not depend on their order. Moments are
    stored in `optimizer.moment_dtype` and are float32 while they are used.
    """
    c = config.optimizer
    table = parameter_table(config.model)
    matrices = [name for name, p in table.items() if p.role == "matrix"]
    others = [name for name in table if name not in matrices]
    adam = optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)
    rules = {
        "adamw": {"adam": adam},
        "lion": {"lion": optax.scale_by_lion(c.beta1, c.beta2)},
        "adafactor": {"adafactor": scale_by_adafactor(table)},
        "muon": {
            "momentum": only(matrices, optax.trace(c.muon_momentum, nesterov=True)),
            "orthogonal": only(matrices, orthogonalize(table, jnp.dtype(config.model.compute_dtype))),
            "adam": only(others, adam),
        },
    }
    dtype = jnp.dtype(c.moment_dtype)
    decays = nested({name: p.decay for name, p in table.items()})
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()),
        *((name, stored_in(dtype, rule)) for name, rule in rules[c.name].items()),
        ("decay", optax.add_decayed_weights(c.weight_decay, mask=decays)),
        ("schedule", optax.scale_by_learning_rate(learning_rate(config))),
    )


def only(names: Collection[str], inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to the named parameters and keeps state for them alone; all others pass through."""

    def select(tree: Weights) -> Weights:
        return nested({name: x for name, x in flattened(tree).items() if name in names})

    def update(gradients: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        updates, state = inner.update(select(gradients), state, select(weights))
        return nested(flattened(gradients) | flattened(updates)), state

    return optax.GradientTransformation(lambda weights: inner.init(select(weights)), update)


def stored_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` in float32 and stores the floating-point arrays of its state in `dtype` between updates."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradients: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        updates, state = inner.update(gradients, cast(state, jnp.float32), weights)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda weights: cast(inner.init(weights), dtype), update)
