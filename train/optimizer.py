"""What turns a gradient into an update of the weights."""

import math
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import rsqrt
from jax.sharding import PartitionSpec

from model.parameters import Parameter, flattened, nested, parameter_table
from model.sharding import as_tuple
from train.config import Config
from train.schedule import learning_rate

Weights = dict[str, Any]
# Of Newton–Schulz's quintic polynomial, and how often it is applied (Jordan et al. 2024).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of `optimizer.name`, after clipping by the global norm; decay by the parameter table.

    - adamw: Loshchilov and Hutter 2019, arXiv:1711.05101.
    - lion: Chen et al. 2023, arXiv:2302.06675.
    - adafactor: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4, with the schedule as its relative step size.
    - muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, for matrices, at the size of AdamW's updates
      (Liu et al. 2025, arXiv:2502.16982), and AdamW for all others.

    Its state is a dictionary by these names, so that a checkpoint does not depend on the order of the chain. What it
    remembers of gradients is stored in `optimizer.moment_dtype`, and float32 while it is used.
    """
    c, table = config.optimizer, parameter_table(config.model)
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
    """`inner` for the parameters of these names, with a state of them alone; the others pass as they are."""

    def chosen(tree: Weights) -> Weights:
        return nested({name: x for name, x in flattened(tree).items() if name in names})

    def update(gradients: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        updates, state = inner.update(chosen(gradients), state, chosen(weights))
        return nested(flattened(gradients) | flattened(updates)), state

    return optax.GradientTransformation(lambda weights: inner.init(chosen(weights)), update)


def stored_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with the floating-point arrays of its state in `dtype` between updates, and float32 within."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(gradients: Weights, state: Any, weights: Weights) -> tuple[Weights, Any]:
        updates, state = inner.update(gradients, cast(state, jnp.float32), weights)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda weights: cast(inner.init(weights), dtype), update)


# ── Muon ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def orthogonalize(table: Mapping[str, Parameter], dtype: jnp.dtype) -> optax.GradientTransformation:
    """Each layer's matrix replaced by the nearest orthogonal one, times 0.2 · √max(in, out).

    Rows are what the forward pass sums over and columns what it yields, all heads in one matrix. The factor gives the
    update of any shape the root mean square of AdamW's, about 0.2 (Liu et al. 2025).
    """

    def update(updates: Weights, weights: Weights | None) -> Weights:
        del weights
        return nested({name: _orthogonal(x, table[name], dtype) for name, x in flattened(updates).items()})

    return optax.stateless(update)


def _orthogonal(x: jax.Array, p: Parameter, dtype: jnp.dtype) -> jax.Array:
    batch = [axis for axis in p.axes if axis not in (*p.fan_in, *p.fan_out)]
    order = [list(p.axes).index(axis) for axis in (*batch, *p.fan_in, *p.fan_out)]
    rows, columns = (math.prod(p.axes[axis] for axis in axes) for axes in (p.fan_in, p.fan_out))
    found, places = x.astype(dtype), way_to_whole_matrices(x, p.axes.get("layers", 1))
    for place in places[1:]:
        found = jax.reshard(found, place)
    turned = found.transpose(order)
    found = newton_schulz(turned.reshape(-1, rows, columns)) * (0.2 * math.sqrt(max(rows, columns)))
    found = found.reshape(turned.shape).transpose([order.index(i) for i in range(x.ndim)])
    for place in places[-2::-1]:
        found = jax.reshard(found, place)
    return found.astype(x.dtype)


def way_to_whole_matrices(x: jax.Array, num_layers: int) -> list[PartitionSpec]:
    """Partitions from that of a stacked parameter to one where each device has some layers whole.

    The products of matrices that are cut up would wait for each other's sums. The layers are shared out by the mesh
    axes that come to the most devices among which they divide evenly; where that is not all, some do the same work.
    One mesh axis moves at a time, from its place to the layers: an all-to-all, where XLA would gather everything for
    several at once.
    """
    size = jax.sharding.get_abstract_mesh().shape
    devices = {
        axes: math.prod(size[axis] for axis in axes)
        for count in range(len(size) + 1)
        for axes in combinations(size, count)
    }
    places = [jax.typeof(x).sharding.spec]
    even = [axes for axes in devices if num_layers % devices[axes] == 0]
    own = {axis for here in places[0] for axis in as_tuple(here)}
    chosen = max(even, key=lambda axes: (devices[axes], sum(axis in own for axis in axes)))
    for count, axis in enumerate(chosen, 1):
        kept = [tuple(name for name in as_tuple(here) if name != axis) for here in places[-1][1:]]
        places.append(PartitionSpec(chosen[:count], *kept))
    return [*places, PartitionSpec(chosen)]


def newton_schulz(x_LMN: jax.Array) -> jax.Array:
    """U Vᵀ of each matrix U S Vᵀ, roughly: singular values come to lie between 0.7 and 1.2.

    Args:
        x_LMN: L matrices. In bfloat16 the products still accumulate in float32; its rounding moves the result by about
            4%, less than the polynomial leaves undone.
    """
    if tall := x_LMN.shape[1] > x_LMN.shape[2]:
        x_LMN = x_LMN.swapaxes(1, 2)
    dtype = x_LMN.dtype

    def product(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.einsum(equation, one, other, preferred_element_type=jnp.float32).astype(dtype)

    def iteration(_: int, x_LMN: jax.Array) -> jax.Array:
        a, b, c = COEFFICIENTS
        gram_LMM = product("lmn,lkn->lmk", x_LMN, x_LMN)
        polynomial_LMM = b * gram_LMM + c * product("lmn,lnk->lmk", gram_LMM, gram_LMM)
        return a * x_LMN + product("lmk,lkn->lmn", polynomial_LMM, x_LMN)

    norm = jnp.linalg.norm(x_LMN.astype(jnp.float32), axis=(1, 2), keepdims=True)
    x_LMN = (x_LMN / jnp.maximum(norm, 1e-30)).astype(dtype)
    x_LMN = jax.lax.fori_loop(0, ITERATIONS, iteration, x_LMN)
    return x_LMN.swapaxes(1, 2) if tall else x_LMN


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
