"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): orthogonalized momentum for matrices.

optax has a Muon, too. Ours differs in what it saves (the momentum alone) and in bfloat16, where its norm and products
accumulate in float32; optax's would change the saved state and the bits of every run that trains with it.
"""

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

# Coefficients of the quintic Newton–Schulz polynomial, and its number of iterations (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(table: Mapping[str, Parameter], dtype: jnp.dtype) -> optax.GradientTransformation:
    """Replaces each layer's matrix by the nearest orthogonal matrix, times 0.2 · √max(in, out).

    Rows are the fan-in axes of the parameter table and columns its fan-out axes, with all heads in one matrix. The
    factor gives updates of every shape the root mean square of AdamW's updates, about 0.2 (Liu et al. 2025,
    arXiv:2502.16982). The matrix products are in `dtype`.
    """

    def update(updates: Weights, _: Weights | None) -> Weights:
        return nested({name: _orthogonalize(x, table[name], dtype) for name, x in flattened(updates).items()})

    return optax.stateless(update)


def _orthogonalize(x: jax.Array, p: Parameter, dtype: jnp.dtype) -> jax.Array:
    layer_axes = [axis for axis in p.axes if axis not in (*p.fan_in, *p.fan_out)]
    order = [list(p.axes).index(axis) for axis in (*layer_axes, *p.fan_in, *p.fan_out)]
    rows = math.prod(p.axes[axis] for axis in p.fan_in)
    columns = math.prod(p.axes[axis] for axis in p.fan_out)
    specs = specs_to_whole_matrices(x, p.axes.get("layers", 1))
    update = x.astype(dtype)
    for spec in specs[1:]:
        update = jax.reshard(update, spec)
    transposed = update.transpose(order)
    update = newton_schulz(transposed.reshape(-1, rows, columns)) * (0.2 * math.sqrt(max(rows, columns)))
    update = update.reshape(transposed.shape).transpose([order.index(i) for i in range(x.ndim)])
    for spec in specs[-2::-1]:
        update = jax.reshard(update, spec)
    return update.astype(x.dtype)


def specs_to_whole_matrices(x: jax.Array, num_layers: int) -> list[PartitionSpec]:
    """Returns the partitions through which a stacked parameter moves until every device holds whole layers.

    Products of sharded matrices would wait for each other's reductions. The layers are sharded over the largest
    product of mesh axes that divides them evenly; if some axes remain, their devices repeat the same work. One mesh
    axis moves at a time, which is an all-to-all; XLA would all-gather everything to move several at once.
    """
    mesh_size = jax.sharding.get_abstract_mesh().shape
    devices = {
        axes: math.prod(mesh_size[axis] for axis in axes)
        for count in range(len(mesh_size) + 1)
        for axes in combinations(mesh_size, count)
    }
    specs = [jax.typeof(x).sharding.spec]
    divisors = [axes for axes in devices if num_layers % devices[axes] == 0]
    axes_of_x = {axis for entry in specs[0] for axis in as_tuple(entry)}
    layer_sharding = max(divisors, key=lambda axes: (devices[axes], sum(axis in axes_of_x for axis in axes)))
    for count, moved in enumerate(layer_sharding, 1):
        others = [tuple(axis for axis in as_tuple(entry) if axis != moved) for entry in specs[-1][1:]]
        specs.append(PartitionSpec(layer_sharding[:count], *others))
    return [*specs, PartitionSpec(layer_sharding)]


def newton_schulz(x_LMN: jax.Array) -> jax.Array:
    """Returns approximately U Vᵀ for each of L matrices U S Vᵀ, with singular values between 0.7 and 1.2.

    In bfloat16 the products still accumulate in float32; rounding changes the result by about 4%, less than the error
    of the polynomial.
    """
    if tall := x_LMN.shape[1] > x_LMN.shape[2]:
        x_LMN = x_LMN.swapaxes(1, 2)
    dtype = x_LMN.dtype

    def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32).astype(dtype)

    def iteration(_: int, x_LMN: jax.Array) -> jax.Array:
        a, b, c = COEFFICIENTS
        gram_LMM = product("lmn,lkn->lmk", x_LMN, x_LMN)
        polynomial_LMM = b * gram_LMM + c * product("lmn,lnk->lmk", gram_LMM, gram_LMM)
        return a * x_LMN + product("lmk,lkn->lmn", polynomial_LMM, x_LMN)

    norm = jnp.linalg.norm(x_LMN.astype(jnp.float32), axis=(1, 2), keepdims=True)
    x_LMN = (x_LMN / jnp.maximum(norm, 1e-30)).astype(dtype)
    x_LMN = jax.lax.fori_loop(0, ITERATIONS, iteration, x_LMN)
    return x_LMN.swapaxes(1, 2) if tall else x_LMN
