"""Floor 4 as a mixture of experts: a router sends each token through k of E feed-forwards (Shazeer et al. 2017).

No token is dropped. On one device the rows of all tokens are sorted by expert, multiplied in groups, and added up
again. Experts are stored like other weights, and gathered a layer at a time; over the mesh axes of "experts" they stay
where they are, and the tokens are gathered instead, and their sums scattered.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.backend import platform
from model.config import ResolvedModelConfig
from model.feedforward import experts_on_cpu
from model.feedforward.dense import FeedForward, activate
from model.feedforward.grouped import grouped_product
from model.feedforward.router import Router, Routing
from model.feedforward.rows import added, permuted, spread, summed, taken
from model.linear import Linear
from model.sharding import Layout, as_tuple

# Rows that a device computes at once for the experts that it holds, as a multiple of the rows in balance.
ROWS_AT_ONCE = 1.25
# The name of the loop over blocks that only an unbalanced router needs.
FURTHER_BLOCKS = "further_blocks"
# Logical axes of the experts' weights, in their order.
WEIGHTS = {
    "gate_up": ("experts", "expert_model", None, "feedforward"),
    "down": ("experts", "feedforward", "expert_model"),
    "gate_up_bias": ("experts", None, "feedforward"),
    "down_bias": ("experts", None),
}


class Experts(nnx.Module):
    """y = Σ weight · expert(x) over the experts of each token, and the shared expert, which computes all tokens."""

    def __init__(
        self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout, linear: type[Linear] = Linear
    ):
        self.config = config
        self.layout = layout
        self.router = Router(config, weights, layout)
        self.weights = nnx.Dict({name: nnx.Param(weights[name]) for name in WEIGHTS if name in weights})
        self.shared = FeedForward(config, weights["shared"], layout, linear) if "shared" in weights else None
        self.shared_gate = nnx.Param(weights["shared_gate"]) if "shared_gate" in weights else None

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None = None) -> tuple[jax.Array, Routing | None]:
        """Maps [B, T, D] to [B, T, D].

        Args:
            counted_BT: True for the positions that the router's sums count; without them there are no sums.
        """
        ids_BTk, weights_BTk, routing = self.router(x_BTD, counted_BT)
        stored = {name: param[...].astype(x_BTD.dtype) for name, param in self.weights.items()}
        y_BTD = self._experts(x_BTD, ids_BTk, weights_BTk, stored)
        if self.shared is not None:
            y_BTD = y_BTD + self._shared(x_BTD)
        return checkpoint_name(y_BTD, "experts"), routing

    def _shared(self, x_BTD: jax.Array) -> jax.Array:
        assert self.shared
        y_BTD: jax.Array = self.shared(x_BTD)
        if self.shared_gate is None:
            return y_BTD
        gate_BT1 = jnp.sum(x_BTD.astype(jnp.float32) * self.shared_gate[...], -1, keepdims=True)
        return (y_BTD * jax.nn.sigmoid(gate_BT1)).astype(x_BTD.dtype)

    def _experts(
        self, x_BTD: jax.Array, ids_BTk: jax.Array, weights_BTk: jax.Array, stored: dict[str, jax.Array]
    ) -> jax.Array:
        layout = self.layout
        compute = partial(_on_one_device, self.config, layout)
        if not layout.rules:
            return compute(x_BTD, ids_BTk, weights_BTk, stored)
        rows = layout.spec("batch", "sequence", None)
        specs = (rows, rows, rows, {name: layout.spec(*WEIGHTS[name]) for name in stored})
        # Kernels do not state over which mesh axes their results vary, so nothing can check it.
        return jax.shard_map(compute, in_specs=specs, out_specs=rows, check_vma=False)(
            x_BTD, ids_BTk, weights_BTk, stored
        )


class Rows(NamedTuple):
    """The choices of all tokens on a device, sorted by expert.

    Attributes:
        order: the choice, n · k + j of token n, in each sorted row, int32 [N k]; first those of own experts.
        sizes: the rows of each own expert, int32 [E].
    """

    order: jax.Array
    sizes: jax.Array


def _on_one_device(
    config: ResolvedModelConfig,
    layout: Layout,
    x_BTD: jax.Array,
    ids_BTk: jax.Array,
    weights_BTk: jax.Array,
    stored: dict[str, jax.Array],
) -> jax.Array:
    """Computes a device's own experts for the tokens that it is to gather, and scatters the sums."""
    weights = {name: _gathered(name, w, layout) for name, w in stored.items()}
    if "down_bias" in weights:
        # All devices that share an expert's width add it up, so it is in the sum of one.
        first = math.prod(jax.lax.axis_index(axis) == 0 for axis in _shared_by(layout, "feedforward"))
        weights["down_bias"] = weights["down_bias"] * first
    axes = [("experts", "batch", 0), ("feedforward", "sequence", 1)]
    gathers = [(mesh, axis) for name, of, axis in axes for mesh in _shared_by(layout, name) if mesh in _of(layout, of)]
    sums = [mesh for name, of, _ in axes for mesh in _shared_by(layout, name) if mesh not in _of(layout, of)]
    for mesh, axis in reversed(gathers):
        gather = partial(jax.lax.all_gather, axis_name=mesh, axis=axis, tiled=True)
        x_BTD, ids_BTk, weights_BTk = gather(x_BTD), gather(ids_BTk), gather(weights_BTk)
    by_token = lambda x_BTD: x_BTD.reshape(-1, x_BTD.shape[-1])
    first_expert = _first_expert(layout, len(weights["down"]))
    compute = on_cpu if platform() == "cpu" else sorted_by_expert
    y_ND = compute(config, by_token(x_BTD), by_token(ids_BTk), by_token(weights_BTk), weights, first_expert)
    y_BTD = y_ND.reshape(x_BTD.shape)
    for mesh, axis in gathers:
        y_BTD = jax.lax.psum_scatter(y_BTD, mesh, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(y_BTD, sums) if sums else y_BTD


def on_cpu(
    config: ResolvedModelConfig,
    x_ND: jax.Array,
    ids_Nk: jax.Array,
    weights_Nk: jax.Array,
    weights: dict[str, jax.Array],
    first_expert: jax.Array | int,
) -> jax.Array:
    """Returns the sums of own experts [N, D] for all tokens, as `sorted_by_expert`."""
    experts = experts_on_cpu.Weights(
        weights["gate_up"], weights["down"], weights.get("gate_up_bias"), weights.get("down_bias")
    )
    return experts_on_cpu.experts_on_cpu(config.activation, x_ND, ids_Nk, weights_Nk, experts, first_expert)


def sorted_by_expert(
    config: ResolvedModelConfig,
    x_ND: jax.Array,
    ids_Nk: jax.Array,
    weights_Nk: jax.Array,
    weights: dict[str, jax.Array],
    first_expert: jax.Array | int,
) -> jax.Array:
    """Returns the sums of own experts [N, D] for all tokens, whose rows are sorted to be multiplied in groups.

    Args:
        weights: the arrays of this device's experts from `_gathered`; `first_expert` is the first one's number.
    """
    E = len(weights["down"])
    has_all = config.num_experts == E
    rows = _sorted(ids_Nk.reshape(-1) - first_expert, E, has_all)
    compute = _all_at_once if has_all else _in_blocks
    return compute(config, x_ND, weights_Nk.reshape(-1), weights, rows)


def _of(layout: Layout, axis: str) -> tuple[str, ...]:
    return as_tuple(layout.rules.get(axis))


def _shared_by(layout: Layout, axis: str) -> list[str]:
    """Returns the mesh axes of more than one device that a logical axis is sharded over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return [mesh for mesh in _of(layout, axis) if sizes[mesh] > 1]


def _gathered(name: str, weight: jax.Array, layout: Layout) -> Any:
    """Gathers the stored axis of a weight; the backward pass scatters its gradient, a mesh axis at a time.

    Gate and up are two arrays where `_apart`, and else joined before: TPUs pad an axis of two. Down is transposed on
    accelerators, [E, D, F], as the last axis cannot be gathered without a copy of the whole.
    """
    axes = WEIGHTS[name]
    if name == "gate_up" and _apart(weight):
        return tuple(_gathered("gate_up", weight[:, :, half : half + 1], layout) for half in range(2))
    if name.startswith("gate_up"):
        weight = weight.reshape(*weight.shape[:-2], -1)
    if name == "down" and platform() != "cpu":
        weight, axes = weight.swapaxes(1, 2), (axes[0], axes[2], axes[1])
    if "expert_model" not in axes:
        return weight
    for mesh in reversed(_shared_by(layout, "expert_model")):
        weight = jax.lax.all_gather(weight, mesh, axis=axes.index("expert_model"), tiled=True)
    return weight


def _apart(gate_up_ED2F: jax.Array) -> bool:
    """True where gate and up are better multiplied apart.

    Joined, a row's gradients of both are read and written once more, 4F numbers; apart, its two gradients of x are read
    and their sum is written, 3D.
    """
    _, D, halves, F = gate_up_ED2F.shape
    return halves == 2 and platform() != "cpu" and 4 * F > 3 * D


def _first_expert(layout: Layout, E: int) -> jax.Array | int:
    """Returns the number of this device's first expert, of which it has E."""
    shared = _shared_by(layout, "experts")
    return jax.lax.axis_index(tuple(shared)) * E if shared else 0


def _sorted(ids_M: jax.Array, E: int, has_all: bool) -> Rows:
    """Sorts choices by expert, and those of other devices' experts behind all own; the sort is stable."""
    keys_M = ids_M if has_all else jnp.where((ids_M >= 0) & (ids_M < E), ids_M, E)
    order_M = checkpoint_name(jnp.argsort(keys_M, stable=True), "routing")
    # By comparison: a histogram would be a scatter.
    return Rows(order_M, jnp.sum(keys_M[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32))


def _feed_forward(
    config: ResolvedModelConfig,
    x_MD: jax.Array,
    weight_M: jax.Array,
    weights: dict[str, jax.Array],
    sizes: jax.Array,
    is_own_M1: jax.Array | None = None,
    dtype: Any = None,
    expected: int | None = None,
) -> jax.Array:
    """Maps sorted rows [M, D] through their experts; the router's weight is a factor of the hidden rows [M, F].

    Rows that are not own are undefined, and have no part in the gradients of weights.

    Args:
        expected: the own rows where the load is balanced; by default all.
    """
    gate_up, down = weights["gate_up"], weights["down"]
    E = len(down)
    if isinstance(gate_up, tuple):
        halves = [grouped_product(x_MD, half_EDF, sizes, expected=expected) for half_EDF in gate_up]
    else:
        halves = jnp.split(grouped_product(x_MD, gate_up, sizes, expected=expected), 2, axis=1)
    has_bias = "gate_up_bias" in weights
    if has_bias:
        ends = jnp.cumsum(sizes)
        ids_M = jnp.sum(jnp.arange(len(x_MD))[:, None] >= ends, axis=1)
        hot_ME = (ids_M[:, None] == jnp.arange(E)).astype(down.dtype)
        biases = jnp.split(hot_ME @ weights["gate_up_bias"], 2, axis=1)
        halves = [half_MF + bias_MF for half_MF, bias_MF in zip(halves, biases, strict=True)]
        # The gradients of biases are sums over all rows.
        halves = halves if is_own_M1 is None else [jnp.where(is_own_M1, half_MF, 0) for half_MF in halves]
    h_MF = _hidden(config.activation, weight_M, *halves)
    y_MD = grouped_product(h_MF, down, sizes, dtype, expected, transposed=True)
    if has_bias:
        y_MD = y_MD + ((hot_ME * weight_M[:, None]).astype(down.dtype) @ weights["down_bias"]).astype(y_MD.dtype)
    return y_MD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden(activation: str, weight_M: jax.Array, gate_MF: jax.Array, up_MF: jax.Array) -> jax.Array:
    """Returns the hidden rows times the router's weights; the backward pass keeps nothing more than the arguments."""
    h_MF = activate(activation, gate_MF.astype(jnp.float32), up_MF.astype(jnp.float32))
    return (h_MF * weight_M[:, None]).astype(gate_MF.dtype)


def _hidden_backward(activation: str, kept: tuple[jax.Array, ...], of_h_MF: jax.Array) -> tuple[jax.Array, ...]:
    weight_M, *halves = kept
    h_MF, pull = jax.vjp(partial(activate, activation), *(half.astype(jnp.float32) for half in halves))
    of_h_MF = of_h_MF.astype(jnp.float32)
    of_weight_M = jnp.sum(h_MF * of_h_MF, axis=1).astype(weight_M.dtype)
    of_halves = pull(of_h_MF * weight_M[:, None])
    return of_weight_M, *(of_half.astype(half.dtype) for of_half, half in zip(of_halves, halves, strict=True))


_hidden.defvjp(lambda activation, *inputs: (_hidden(activation, *inputs), inputs), _hidden_backward)


def _all_at_once(
    config: ResolvedModelConfig, x_ND: jax.Array, weights_M: jax.Array, weights: dict[str, jax.Array], rows: Rows
) -> jax.Array:
    """Returns the tokens' sums [N, D] where a device has all experts, so that no row is another device's."""
    N, k = len(x_ND), config.experts_per_token
    inverse = checkpoint_name(jnp.argsort(rows.order), "routing")
    tokens_M, rows_kN = rows.order // k, inverse.reshape(N, k).T
    x_MD, weight_M = spread(x_ND, tokens_M, rows_kN), permuted(weights_M, rows.order, inverse)
    y_MD = _feed_forward(config, x_MD, weight_M, weights, rows.sizes)
    return summed(y_MD, tokens_M, rows_kN)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(
    config: ResolvedModelConfig, x_ND: jax.Array, weights_M: jax.Array, weights: dict[str, jax.Array], rows: Rows
) -> jax.Array:
    """Returns what own experts add to the tokens' sums [N, D], of all experts a part.

    Rows are computed in blocks of a fixed number. However unbalanced the router is, memory stays that of a block, and
    only time grows; devices may need different numbers of blocks, as there is no collective within. Nearly always the
    first is all, so it is computed apart: its gradients need no zeros to be added to.
    """
    block = lambda b: _block(config, b, rows, x_ND, weights_M, weights)
    add = lambda b, y_ND: _plus(y_ND, block(b))
    with jax.named_scope(FURTHER_BLOCKS):
        return jax.lax.fori_loop(1, _num_blocks(config, rows), add, block(0).astype(x_ND.dtype))


def _plus(sum: jax.Array, more: jax.Array) -> jax.Array:
    return (sum.astype(jnp.float32) + more.astype(jnp.float32)).astype(sum.dtype)


def _in_blocks_forward(config: ResolvedModelConfig, *arguments: Any) -> tuple[jax.Array, Any]:
    return _in_blocks(config, *arguments), arguments


def _in_blocks_backward(config: ResolvedModelConfig, arguments: Any, dy_ND: jax.Array) -> tuple[Any, ...]:
    *inputs, rows = arguments
    gradients = lambda b: jax.vjp(partial(_block, config, b, rows), *inputs)[1](dy_ND.astype(jnp.float32))
    add = lambda b, sums: jax.tree.map(_plus, sums, gradients(b))
    with jax.named_scope(FURTHER_BLOCKS):
        sums = jax.lax.fori_loop(1, _num_blocks(config, rows), add, gradients(0))
    return *sums, None


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _block_size(config: ResolvedModelConfig, rows: Rows) -> int:
    return min(-(-math.ceil(ROWS_AT_ONCE * _balanced(config, rows)) // 8) * 8, len(rows.order))


def _balanced(config: ResolvedModelConfig, rows: Rows) -> float:
    """Returns the own rows of a device where all experts have as many."""
    assert config.num_experts
    return len(rows.order) * len(rows.sizes) / config.num_experts


def _num_blocks(config: ResolvedModelConfig, rows: Rows) -> jax.Array:
    return -(-jnp.sum(rows.sizes) // _block_size(config, rows))


def _block(
    config: ResolvedModelConfig,
    b: jax.Array | int,
    rows: Rows,
    x_ND: jax.Array,
    weights_M: jax.Array,
    weights: dict[str, jax.Array],
) -> jax.Array:
    """Returns what the sorted rows of block b add to the tokens' sums, float32 [N, D].

    Rows that are not own have no choice and no token: what is computed for them is dropped.
    """
    R, M, k = _block_size(config, rows), len(rows.order), config.experts_per_token
    ends = jnp.cumsum(rows.sizes)
    row_R = b * R + jnp.arange(R)
    is_own_R = row_R < ends[-1]
    choice_R = jnp.where(is_own_R, rows.order[jnp.minimum(row_R, M - 1)], M)
    sizes = jnp.clip(ends - b * R, 0, R) - jnp.clip(ends - rows.sizes - b * R, 0, R)
    x_RD, weight_R = taken(x_ND, choice_R // k), taken(weights_M, choice_R)
    expected = min(R, math.ceil(_balanced(config, rows)))
    y_RD = _feed_forward(config, x_RD, weight_R, weights, sizes, is_own_R[:, None], jnp.float32, expected)
    return added(len(x_ND), x_ND.dtype, y_RD, choice_R // k)
