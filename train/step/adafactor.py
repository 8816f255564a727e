"""Adafactor."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import rsqrt

from model.parameters import Parameter
from model.trees import flattened, nested
from train.step.state import Weights

# ── Adafactor ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class AdafactorState(NamedTuple):
    """Updates so far; means of the squared gradient over columns (whole for vectors), and over rows (of matrices)."""

    step: jax.Array
    rows: Weights
    columns: Weights


def scale_by_adafactor(table: Mapping[str, Parameter]) -> optax.GradientTransformation:
    """Gradients divided by the root of a mean square that is kept as the product of two vectors a matrix.

    Each layer's matrix has its own, rows and columns by the table: what is summed over against what comes out, and in
    a lookup the entries against their components. Updates are clipped to a root mean square of 1 and multiplied by
    the weights' own, at least 10⁻³; the mean's decay at update t is 1 − t^−0.8 (Shazeer and Stern 2018).
    """
    rows, columns = {}, {}
    layer = {name: [i for i, axis in enumerate(p.axes) if axis != "layers"] for name, p in table.items()}
    for name, p in table.items():
        vector = p.role in ("norm", "bias")
        first = len(p.fan_in) or 1
        rows[name] = [] if vector else layer[name][:first]
        columns[name] = [] if vector else layer[name][first:]

    def mean(x: jax.Array, axes: list[int]) -> jax.Array:
        return jnp.mean(x, axes, keepdims=True)

    def means(squares: Mapping[str, jax.Array]) -> tuple[Weights, Weights]:
        over_columns = {name: mean(x, columns[name]) for name, x in squares.items()}
        return over_columns, {name: mean(x, rows[name]) for name, x in squares.items() if rows[name]}

    def init(weights: Weights) -> AdafactorState:
        zeros = jax.tree.map(jnp.zeros_like, means(flattened(weights)))
        return AdafactorState(jnp.zeros((), jnp.int32), *map(nested, zeros))

    def update(gradients: Weights, state: AdafactorState, weights: Weights) -> tuple[Weights, AdafactorState]:
        step, flat = state.step + 1, flattened(gradients)
        rate = step.astype(jnp.float32) ** -0.8
        now = means({name: jnp.square(x) + 1e-30 for name, x in flat.items()})
        before = flattened(state.rows), flattened(state.columns)
        row, column = jax.tree.map(lambda old, new: old + rate * (new - old), before, now)
        updates = {}
        for name, weight in flattened(weights).items():
            if rows[name]:
                # Not their product: those of a word that never came are too small for one.
                scaled = flat[name] * rsqrt(row[name] / mean(row[name], rows[name])) * rsqrt(column[name])
            else:
                scaled = flat[name] * rsqrt(row[name])
            scaled /= jnp.maximum(jnp.sqrt(mean(jnp.square(scaled), layer[name])), 1.0)
            updates[name] = scaled * jnp.maximum(jnp.sqrt(mean(jnp.square(weight), layer[name])), 1e-3)
        return nested(updates), AdafactorState(step, nested(row), nested(column))

    return optax.GradientTransformation(init, update)
