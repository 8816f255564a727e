"""SOAP (Vyas et al. 2024, arXiv:2409.11321): Adam in the eigenbases of Shampoo's preconditioners, one for each side.

A side of a matrix is its rows or its columns. Its statistics are the running mean of G Gᵀ or of Gᵀ G over gradients G,
and its basis holds their eigenvectors, those of the largest eigenvalues first. Layers and experts of statistics and
bases [..., m, m] are stored where Muon puts those of matrices, and their rows are shared by the mesh axes that remain.
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


class Side(NamedTuple):
    """A side of a matrix [..., m, n].

    Attributes:
        statistics, basis: the fields of the state that hold them.
        axis: the side's axis of the matrix.
        gram: the product of the matrix with itself over the other side.
        into, back: the products of the matrix with the basis [..., m, k], into the basis and back.
    """

    statistics: str
    basis: str
    axis: int
    gram: str
    into: str
    back: str


SIDES = (
    Side("row_statistics", "row_bases", -2, "...mn,...kn->...mk", "...mn,...mk->...kn", "...kn,...mk->...mn"),
    Side("column_statistics", "column_bases", -1, "...mn,...mk->...nk", "...mn,...nk->...mk", "...mk,...nk->...mn"),
)
# The fields of the state that hold them.
FIELDS = [field for side in SIDES for field in (side.statistics, side.basis)]
# Rounds of the first step, whose bases then diagonalize the statistics but for correlations of about 3%.
FIRST_ROUNDS = 20
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

    As in the authors' code, the first update is zero and counts in no mean of Adam: it only finds the bases. A round
    that moves the bases is a step of the power iteration and a QR decomposition (algorithm 4): one every
    `soap_every_steps` steps, and FIRST_ROUNDS from the identity for a matrix's first bases, where the authors' code
    calls eigh, whose program for TPUs is large. The statistics decay by `beta2`.
    """

    def update(gradients: Weights, state: SoapState, _: Weights | None = None) -> tuple[Weights, SoapState]:
        old = flattened(state.momentum)
        moved = {name: mean(old[name], x, c.beta1) for name, x in flattened(gradients).items()}
        momentum = nested({name: jnp.where(state.step == 0, old[name], x) for name, x in moved.items()})
        count = jnp.maximum(state.step, 1).astype(jnp.float32)
        scale = jnp.sqrt(1 - c.beta2**count) / (1 - c.beta1**count)
        updates, state = _precondition(table, c, False, gradients, momentum, state._replace(momentum=momentum))
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
        updates, after = _precondition(table, c, True, gradients, momentum, state._replace(momentum=sums))
        return jax.tree.map(lambda x, y: jnp.where(state.step == 0, x, y), momentum, updates), after

    return optax.GradientTransformationExtraArgs(partial(_init, table, c), update)


def mean(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """Returns the running mean after one more value."""
    return decay * old + (1 - decay) * new


def _init(table: Mapping[str, Parameter], c: OptimizerConfig, weights: Weights) -> SoapState:
    zeros = jax.tree.map(jnp.zeros_like, weights)
    stored: dict[str, dict[str, jax.Array]] = {field: {} for field in FIELDS}
    for name, x in flattened(weights).items():
        matrices = jax.eval_shape(lambda x, p=table[name]: whole_matrices(x, p)[0], x)
        for side in SIDES:
            if (m := matrices.shape[side.axis]) <= c.soap_max_dim:
                zero = jnp.zeros((*matrices.shape[:-2], m, m), out_sharding=_stored_spec(matrices, m))
                stored[side.statistics][name] = stored[side.basis][name] = zero
    return SoapState(jnp.zeros((), jnp.int32), zeros, zeros, **{field: nested(of) for field, of in stored.items()})


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
    of_momentum: bool,
    gradients: Weights,
    momentum: Weights,
    state: SoapState,
) -> tuple[Weights, SoapState]:
    """Returns `momentum` divided by the root of `state.squares` in the bases, and the state after the step.

    Args:
        of_momentum: the squares are those of `momentum`, not of the gradients.
    """
    trees = [flattened(tree) for tree in (gradients, momentum, state.squares)]
    stored = {field: flattened(getattr(state, field)) for field in FIELDS}
    updates, squares = {}, {}
    for name in trees[0]:
        views = [whole_matrices(tree[name], table[name]) for tree in trees]
        matrices, as_parameter = [view[0] for view in views], views[0][1]
        whole = PartitionSpec(*_stacks(matrices[0]), None, None)
        old = {field: jax.reshard(of[name], whole) for field, of in stored.items() if name in of}
        specs = (PartitionSpec(), whole, whole)
        of_device = jax.shard_map(partial(_of_device, c, of_momentum), in_specs=specs, out_specs=whole)
        update, square, new = of_device(state.step, matrices, old)
        updates[name], squares[name] = as_parameter(update), as_parameter(square)
        for field, x in new.items():
            stored[field][name] = jax.reshard(x, _stored_spec(matrices[0], x.shape[-1]))
    after = {field: nested(of) for field, of in stored.items()}
    return nested(updates), state._replace(step=state.step + 1, squares=nested(squares), **after)


def _of_device(
    c: OptimizerConfig, of_momentum: bool, step: jax.Array, matrices: list[jax.Array], old: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Does a step with the matrices of one device: returns update, squares, and statistics and bases by field.

    Args:
        matrices: gradient, momentum and squares [..., rows, columns].
    """
    gradient, momentum, squares = matrices
    sides = [side for side in SIDES if side.basis in old]
    squared = momentum if of_momentum else gradient
    for side in sides:
        momentum = product(side.into, momentum, old[side.basis])
        squared = product(side.into, squared, old[side.basis])
    squares = jnp.where(step == 0, squares, mean(squares, jnp.square(squared), c.beta2))
    update = momentum / (jnp.sqrt(squares) + c.epsilon)
    for side in sides:
        update = product(side.back, update, old[side.basis])
    if not sides:
        return update, squares, {}
    gram = {side.statistics: product(side.gram, gradient, gradient) for side in sides}
    new = {field: mean(old[field], x, c.beta2) for field, x in gram.items()}

    def move(_: int, carry: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[jax.Array, dict[str, jax.Array]]:
        squares, bases = carry
        moved = {}
        for side in sides:
            turned = product("...mk,...kn->...mn", new[side.statistics], bases[side.basis])
            # Eigenvectors whose eigenvalues have changed places do so, too, and their squares with them.
            places = jnp.argsort(jnp.sum(bases[side.basis] * turned, -2), descending=True)
            moved[side.basis] = jnp.linalg.qr(jnp.take_along_axis(turned, places[..., None, :], -1)).Q
            squares = jnp.take_along_axis(squares, jnp.expand_dims(places, -3 - side.axis), side.axis)
        return squares, moved

    # A matrix gets its first bases with its first gradient, which an expert without tokens has later than others.
    trace = lambda of: jnp.trace(of[sides[0].statistics], axis1=-2, axis2=-1)
    is_new = trace(old) == 0
    begun = lambda x: jnp.where(is_new[..., None, None], jnp.eye(x.shape[-1]), x)
    bases = {side.basis: begun(old[side.basis]) for side in sides}
    is_first = jnp.any(is_new & (trace(new) > 0))
    rounds = jnp.where(is_first, FIRST_ROUNDS, jnp.where(step % c.soap_every_steps == 0, 1, 0))
    squares, bases = jax.lax.fori_loop(0, rounds, move, (squares, bases))
    return update, squares, new | bases
