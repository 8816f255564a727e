"""SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the eigenbases of Shampoo's preconditioners, one for each side.

A side of a matrix is its rows or its columns. Its statistics are the running mean of G Gᵀ or of Gᵀ G over gradients G,
and its basis holds their eigenvectors, of the largest eigenvalue first. Statistics and bases [..., m, m] are stored with
their layers and experts on the devices that get those for Muon, and their rows over the mesh axes that remain.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from model.parameters import Parameter
from model.sharding import as_tuple
from model.trees import flattened, nested
from train.config.optimizer_config import OptimizerConfig
from train.step.muon import whole_matrices
from train.step.schedule import momentum_at
from train.step.state import Weights

# The sides of a matrix: their fields of the state, their axis, the product of the matrix with itself over the other side,
# and the products of the matrix with the side's basis, into the basis and back.
SIDES = {
    "rows": ("row_statistics", "row_bases", -2, "...mn,...kn->...mk", "...mn,...mk->...kn", "...kn,...mk->...mn"),
    "columns": ("column_statistics", "column_bases", -1, "...mn,...mk->...nk", "...mn,...nk->...mk", "...mk,...nk->...mn"),
}
# Faster products of float32, with TF32 or bfloat16, would round the small eigenvalues away.
product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class SoapState(NamedTuple):
    """The number of updates; the momentum; means of squares in the bases; statistics and bases of both sides.

    Momentum and squares have the shapes and shards of their parameters. A side longer than `soap_max_dim` has no entry.
    """

    step: jax.Array
    momentum: Weights
    squares: Weights
    row_statistics: Weights
    row_bases: Weights
    column_statistics: Weights
    column_bases: Weights


def scale_by_soap(table: Mapping[str, Parameter], c: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adam's updates in the bases of each matrix, of a layer and an expert, rotated back.

    As in the authors' code, the first update is zero and counts in no mean of Adam: it only finds the bases, the
    eigenvectors of the first statistics. Every `soap_every_steps` steps one step of the power iteration and a QR
    decomposition move them. The statistics decay by `beta2`.
    """

    def update(gradients: Weights, state: SoapState, _: Weights | None = None) -> tuple[Weights, SoapState]:
        old = flattened(state.momentum)
        moved = {name: mean(old[name], x, c.beta1) for name, x in flattened(gradients).items()}
        momentum = nested({name: jnp.where(state.step == 0, old[name], x) for name, x in moved.items()})
        count = jnp.maximum(state.step, 1).astype(jnp.float32)
        scale = jnp.sqrt(1 - c.beta2**count) / (1 - c.beta1**count)
        updates, state = _precondition(table, c, gradients, momentum, state._replace(momentum=momentum))
        return jax.tree.map(lambda x: scale * x, updates), state

    return optax.GradientTransformation(partial(_init, table, c), update)


def momentum_by_soap(table: Mapping[str, Parameter], c: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Muon's momentum, divided by the root of its mean square in the bases, for Muon to orthogonalize.

    The bases are those of SOAP, of the gradients. The first update has none yet and stays as it is. This is "SOAP-Muon"
    of modded-nanogpt (github.com/KellerJordan/modded-nanogpt, records/track_3_optimization); its factor that keeps the
    norm is left out, since orthogonalization does not see it.
    """

    def update(
        gradients: Weights, state: SoapState, _: Weights | None = None, *, step: jax.Array
    ) -> tuple[Weights, SoapState]:
        decay = momentum_at(c, step)
        sums = jax.tree.map(lambda old, x: decay * old + x, state.momentum, gradients)
        momentum = jax.tree.map(lambda total, x: decay * total + x, sums, gradients)
        updates, after = _precondition(table, c, momentum, momentum, state._replace(momentum=sums), gradients)
        return jax.tree.map(lambda x, y: jnp.where(state.step == 0, x, y), momentum, updates), after

    return optax.GradientTransformationExtraArgs(partial(_init, table, c), update)


def mean(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """Returns the running mean after one more value."""
    return decay * old + (1 - decay) * new


def _init(table: Mapping[str, Parameter], c: OptimizerConfig, weights: Weights) -> SoapState:
    zeros = jax.tree.map(jnp.zeros_like, weights)
    sides: dict[str, dict[str, jax.Array]] = {field: {} for fields in SIDES.values() for field in fields[:2]}
    for name, x in flattened(weights).items():
        matrices = jax.eval_shape(lambda x, p=table[name]: whole_matrices(x, p)[0], x)
        for statistics, bases, axis, *_ in SIDES.values():
            if (m := matrices.shape[axis]) <= c.soap_max_dim:
                zero = jnp.zeros((*matrices.shape[:-2], m, m), out_sharding=_stored_spec(matrices, m))
                sides[statistics][name] = sides[bases][name] = zero
    return SoapState(jnp.zeros((), jnp.int32), zeros, zeros, **{field: nested(of) for field, of in sides.items()})


def _stored_spec(matrices: Any, side: int) -> PartitionSpec:
    """Returns the partition in which statistics and bases of a side are stored."""
    sizes = jax.sharding.get_abstract_mesh().shape
    stacks = _stacks(matrices)
    rows: tuple[str, ...] = ()
    for axis, size in sizes.items():
        is_free = not any(axis in entry for entry in stacks)
        if is_free and side % (size * math.prod(sizes[row] for row in rows)) == 0:
            rows = (*rows, axis)
    return PartitionSpec(*stacks, rows, None)


def _stacks(matrices: Any) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each axis of [..., rows, columns] before the last two."""
    spec = jax.typeof(matrices).sharding.spec if isinstance(matrices, jax.Array) else matrices.sharding.spec
    return [as_tuple(entry) for entry in (*spec, *(None,) * matrices.ndim)][: matrices.ndim - 2]


def _precondition(
    table: Mapping[str, Parameter],
    c: OptimizerConfig,
    squared: Weights,
    momentum: Weights,
    state: SoapState,
    gradients: Weights | None = None,
) -> tuple[Weights, SoapState]:
    """Returns `momentum` divided by the root of the running mean square of `squared`, all in the bases, and the state.

    Args:
        gradients: those of the statistics, where they are not `squared`.
    """
    flat = [flattened(tree) for tree in (gradients or squared, squared, momentum, state.squares)]
    fields = {field: flattened(getattr(state, field)) for side in SIDES.values() for field in side[:2]}
    updates, squares = {}, {}
    for name in flat[0]:
        views = [whole_matrices(tree[name], table[name]) for tree in flat]
        matrices, as_parameter = [view[0] for view in views], views[0][1]
        whole = PartitionSpec(*_stacks(matrices[0]), None, None)
        here = [field for field, of in fields.items() if name in of]
        sides = {field: jax.reshard(fields[field][name], whole) for field in here}
        step = jax.shard_map(partial(_of_matrices, c), in_specs=(PartitionSpec(), whole, whole), out_specs=whole)
        update, square, sides = step(state.step, matrices, sides)
        updates[name], squares[name] = as_parameter(update), as_parameter(square)
        for field, x in sides.items():
            fields[field][name] = jax.reshard(x, _stored_spec(matrices[0], x.shape[-1]))
    after = {field: nested(of) for field, of in fields.items()}
    return nested(updates), state._replace(step=state.step + 1, squares=nested(squares), **after)


def _of_matrices(
    c: OptimizerConfig, step: jax.Array, matrices: list[jax.Array], old: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Does a step with the matrices [..., rows, columns] of one device: (update, mean squares, statistics and bases)."""
    gradient, squared, momentum, squares = matrices
    sides = [side for side in SIDES.values() if side[0] in old]
    for _, basis, _, _, into, _ in sides:
        squared, momentum = product(into, squared, old[basis]), product(into, momentum, old[basis])
    squares = mean(squares, jnp.square(squared), c.beta2)
    update = momentum / (jnp.sqrt(squares) + c.epsilon)
    for _, basis, _, _, _, back in sides:
        update = product(back, update, old[basis])
    new = {side[0]: mean(old[side[0]], product(side[3], gradient, gradient), c.beta2) for side in sides}
    bases = {side[1]: old[side[1]] for side in sides}

    def keep(squares: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return squares, bases

    def move(squares: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        moved = {}
        for statistics, basis, axis, *_ in sides:
            turned = product("...mk,...kn->...mn", new[statistics], bases[basis])
            # Eigenvectors whose eigenvalues have changed places do so, too, and their mean squares with them.
            order = jnp.argsort(jnp.sum(bases[basis] * turned, -2), descending=True)
            places = order[..., None, :]
            moved[basis] = jnp.linalg.qr(jnp.take_along_axis(turned, places, -1)).Q
            squares = jnp.take_along_axis(squares, places if axis == -1 else order[..., None], axis)
        return squares, moved

    def find(squares: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return squares, {basis: jnp.linalg.eigh(new[gram]).eigenvectors[..., ::-1] for gram, basis, *_ in sides}

    case = jnp.where(step == 0, 2, jnp.where(step % c.soap_every_steps == 0, 1, 0))
    squares, bases = jax.lax.switch(case, [keep, move, find], squares)
    return update, squares, new | bases
