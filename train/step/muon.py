"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): orthogonalized momentum for matrices.

optax has a Muon, too. Ours differs in what it saves (the momentum alone) and in bfloat16, where its norm and products
accumulate in float32; optax's would change the saved state and the bits of every run that trains with it.
"""

import math
from collections.abc import Callable, Mapping
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
    """Replaces each matrix, of a layer and an expert, by the nearest orthogonal matrix, times 0.2 · √max(in, out).

    Rows are the fan-in axes of the parameter table and columns its fan-out axes, with all heads in one matrix. The
    factor gives updates of every shape the root mean square of AdamW's updates, about 0.2 (Liu et al. 2025,
    arXiv:2502.16982). The matrix products are in `dtype`.
    """

    def orthogonal(x: jax.Array, p: Parameter) -> jax.Array:
        matrices, as_parameter = whole_matrices(x.astype(dtype), p)
        update = newton_schulz(matrices) * (0.2 * math.sqrt(max(matrices.shape[-2:])))
        return as_parameter(update).astype(x.dtype)

    def update(updates: Weights, _: Weights | None) -> Weights:
        return nested({name: orthogonal(x, table[name]) for name, x in flattened(updates).items()})

    return optax.stateless(update)


def whole_matrices(x: jax.Array, p: Parameter) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns a parameter as matrices [..., rows, columns] that no device holds in part, and the inverse function."""
    layer_axes = [axis for axis in p.axes if axis not in (*p.fan_in, *p.fan_out)]
    order = [list(p.axes).index(axis) for axis in (*layer_axes, *p.fan_in, *p.fan_out)]
    rows = math.prod(p.axes[axis] for axis in p.fan_in)
    columns = math.prod(p.axes[axis] for axis in p.fan_out)
    stacks = {i: size for i, (axis, size) in enumerate(p.axes.items()) if axis in ("layers", "experts")}
    specs = specs_to_whole_matrices(x, stacks)
    for spec in specs[1:]:
        x = jax.reshard(x, spec)
    transposed = x.transpose(order)

    def as_parameter(matrices: jax.Array) -> jax.Array:
        y = matrices.reshape(transposed.shape).transpose([order.index(i) for i in range(x.ndim)])
        for spec in specs[-2::-1]:
            y = jax.reshard(y, spec)
        return y

    return transposed.reshape(*transposed.shape[: len(layer_axes)], rows, columns), as_parameter


def specs_to_whole_matrices(x: jax.Array, stacks: Mapping[int, int]) -> list[PartitionSpec]:
    """Returns the partitions through which a stacked parameter moves until every device holds whole matrices.

    Products of sharded matrices would wait for each other's reductions. Layers are sharded over the largest product of
    mesh axes that divides them evenly, and experts over the largest of the others; if some axes remain, their devices
    repeat the same work. One mesh axis moves at a time, which is an all-to-all; XLA would all-gather everything to move
    several at once.

    Args:
        stacks: the sizes of the axes of x over which it is a stack of matrices; those of experts keep their shards.
    """
    mesh_size = jax.sharding.get_abstract_mesh().shape
    size = lambda axes: math.prod(mesh_size[axis] for axis in axes)
    specs = [jax.typeof(x).sharding.spec]
    entries = [as_tuple(entry) for entry in (*specs[0], *(None,) * (x.ndim - len(specs[0])))]
    of_x = {axis for entry in entries for axis in entry}
    free = [axis for axis in mesh_size if not any(axis in entries[stack] for stack in stacks)]
    for stack, number in stacks.items():
        left = number // size(entries[stack])
        choices = [axes for count in range(len(free) + 1) for axes in combinations(free, count)]
        choices = [axes for axes in choices if left % size(axes) == 0]
        for moved in max(choices, key=lambda axes: (size(axes), sum(axis in of_x for axis in axes))):
            entries = [tuple(axis for axis in entry if axis != moved) for entry in entries]
            entries[stack] = (*entries[stack], moved)
            free.remove(moved)
            specs.append(PartitionSpec(*entries))
    whole = [entry if i in stacks else () for i, entry in enumerate(entries)]
    return [*specs, PartitionSpec(*whole)]


def newton_schulz(x: jax.Array) -> jax.Array:
    """Returns approximately U Vᵀ for each of the matrices U S Vᵀ [..., M, N], with singular values from 0.7 to 1.2.

    In bfloat16 the products still accumulate in float32; rounding changes the result by about 4%, less than the error
    of the polynomial.
    """
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.swapaxes(-2, -1)
    dtype = x.dtype

    def product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32).astype(dtype)

    def iteration(_: int, x: jax.Array) -> jax.Array:
        a, b, c = COEFFICIENTS
        gram = product("...mn,...kn->...mk", x, x)
        polynomial = b * gram + c * product("...mn,...nk->...mk", gram, gram)
        return a * x + product("...mk,...kn->...mn", polynomial, x)

    norm = jnp.linalg.norm(x.astype(jnp.float32), axis=(-2, -1), keepdims=True)
    x = (x / jnp.maximum(norm, 1e-30)).astype(dtype)
    x = jax.lax.fori_loop(0, ITERATIONS, iteration, x)
    return x.swapaxes(-2, -1) if tall else x
