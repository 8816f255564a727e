"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4), with rows and columns from the parameter table."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import rsqrt

from model.parameters import CONSTANT, STACKED, Parameter
from model.trees import flattened, nested
from train.step.state import Weights


class AdafactorState(NamedTuple):
    """The number of updates, and means of the squared gradient over columns and over rows.

    Vectors keep their whole squared gradient in `rows` and have no entry in `columns`.
    """

    step: jax.Array
    rows: Weights
    columns: Weights


def scale_by_adafactor(table: Mapping[str, Parameter]) -> optax.GradientTransformation:
    """Divides gradients by the root of a running mean square that is factored into two vectors per matrix.

    Every matrix, of a layer and an expert, has its own vectors. Rows are the fan-in axes of the table and columns the
    fan-out axes; for a lookup table, rows are its entries. Updates are clipped to a root mean square of 1 and
    multiplied by the root mean square of the weights, at least 10⁻³. The decay of the mean at update t is 1 − t^−0.8.
    """
    rows: dict[str, list[int]] = {}
    columns: dict[str, list[int]] = {}
    layer = {name: [i for i, axis in enumerate(p.axes) if axis not in STACKED] for name, p in table.items()}
    for name, p in table.items():
        vector = p.role in CONSTANT or len(layer[name]) < 2
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
        step = state.step + 1
        flat = flattened(gradients)
        rate = step.astype(jnp.float32) ** -0.8
        batch_means = means({name: jnp.square(x) + 1e-30 for name, x in flat.items()})
        old_means = flattened(state.rows), flattened(state.columns)
        row, column = jax.tree.map(lambda old, new: old + rate * (new - old), old_means, batch_means)
        updates = {}
        for name, weight in flattened(weights).items():
            if rows[name]:
                # Two factors, since the product of both means underflows for a token that never occurred.
                scaled = flat[name] * rsqrt(row[name] / mean(row[name], rows[name])) * rsqrt(column[name])
            else:
                scaled = flat[name] * rsqrt(row[name])
            scaled /= jnp.maximum(jnp.sqrt(mean(jnp.square(scaled), layer[name])), 1.0)
            updates[name] = scaled * jnp.maximum(jnp.sqrt(mean(jnp.square(weight), layer[name])), 1e-3)
        return nested(updates), AdafactorState(step, nested(row), nested(column))

    return optax.GradientTransformation(init, update)
