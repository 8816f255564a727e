"""Muon: orthogonalized momentum for matrices."""

import math
from collections.abc import Mapping
from itertools import combinations

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from model.parameters import Parameter
from model.sharding import as_tuple
from model.trees import flattened, nested
from train.step.state import Weights

# Of Newton–Schulz's quintic polynomial, and how often it is applied (Jordan et al. 2024).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


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
