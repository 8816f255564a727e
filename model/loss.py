"""Cross-entropy in chunks of positions, without the logits of a whole batch.

With a vocabulary of 200,000, the logits of one batch would take more memory than everything else. The logits of each
chunk are computed once: the forward pass also computes the chunk's gradients from them, and keeps these for the
backward pass (as in Hsu et al. 2024, Liger Kernel, arXiv:2410.10989).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.backend import on_one_cpu
from model.collectives import gather_weight, partial_sums, scatter_time
from model.config import ResolvedModelConfig
from model.product import einsum, weight_gradients_first
from model.sharding import UNSHARDED, Layout
from model.unembedding import logits, slope_of_products

# On a CPU the logits of a chunk stay in its caches, which takes a quarter off the time of the loss.
CACHED_LOGITS, LEAST_CHUNK = 2**22, 256


class Losses(NamedTuple):
    """Losses in float32 nats, at each position [B, T] or summed.

    Attributes:
        objective: the minimized loss, -(1 - ε) log p(target) - ε mean(log p) + z · log²(denominator), with ε
            `model.label_smoothing` and z `model.z_loss`.
        cross_entropy: -log p(target), which is only reported and has no gradient.
    """

    objective: jax.Array
    cross_entropy: jax.Array


def summed_losses(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: ResolvedModelConfig,
    layout: Layout = UNSHARDED,
) -> Losses:
    """Returns the losses of a batch, weighted and summed.

    Args:
        matrix_DV: the unembedding as it is stored, padded to V columns; the padding has probability zero.
        weights_BT: the weight of each position in the sum, float32.
        config: `loss_chunk` bounds the positions whose logits a device holds at once (but at least one a row).
        layout: the table by which positions and V are sharded.
    """
    x_BTD, matrix_DV = weight_gradients_first(x_BTD, matrix_DV)
    matrix_DV = gather_weight(matrix_DV, layout, "model", "vocabulary")
    return _summed_losses(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout)


def token_losses(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    config: ResolvedModelConfig,
    layout: Layout = UNSHARDED,
) -> Losses:
    """Returns the losses at each position, without gradients; the arguments are those of `summed_losses`."""
    matrix_DV = gather_weight(matrix_DV, layout, "model", "vocabulary")
    return _in_chunks(x_BTD, matrix_DV, targets_BT, None, config, layout)[0]


def predictions(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    config: ResolvedModelConfig,
    layout: Layout = UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
    """Returns log p(target) [B, T] in float32 nats, and [B, T] True where the target is the most likely token.

    Of equally likely tokens the first counts. The arguments are those of `summed_losses`; there are no gradients.
    """
    matrix_DV = gather_weight(matrix_DV, layout, "model", "vocabulary")
    token_V = jnp.arange(matrix_DV.shape[1], out_sharding=layout.out_sharding("vocabulary"))

    def predict_chunk(_: None, x: jax.Array, targets: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores = logits(x, matrix_DV, config)
        target_V = targets[..., None] == token_V
        score = jnp.sum(jnp.where(target_V, scores, 0.0), axis=-1, keepdims=True)
        ahead_V = (scores > score) | ((scores == score) & (token_V < targets[..., None]))
        log_p = score[..., 0] - jax.nn.logsumexp(scores, axis=-1)
        is_first = ~jnp.any(ahead_V & ~target_V, axis=-1)
        return None, (layout.reshard(log_p, "batch", "sequence"), layout.reshard(is_first, "batch", "sequence"))

    _, results = _scan_chunks(predict_chunk, None, (x_BTD, targets_BT), config, layout)
    joined = (_join_chunks(x, targets_BT.shape[1], layout) for x in results)
    log_p, is_first = (layout.reshard(x_BT, "batch", "time") for x_BT in joined)
    return log_p, is_first


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed_losses(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout):  # type: ignore[no-untyped-def]
    losses, _ = _in_chunks(x_BTD, matrix_DV, targets_BT, None, config, layout)
    return jax.tree.map(lambda x_BT: jnp.sum(x_BT * weights_BT), losses)


def _forward(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout):  # type: ignore[no-untyped-def]
    losses, gradients = _in_chunks(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout)
    return jax.tree.map(lambda x_BT: jnp.sum(x_BT * weights_BT), losses), gradients


def _backward(config, layout, gradients, cotangents):  # type: ignore[no-untyped-def]
    dx_BTD, sums_DV = gradients
    slope = cotangents.objective.astype(dx_BTD.dtype)
    dx_BTD = dx_BTD * slope
    if layout.rules:
        # The gradient of the matrix is still to be summed over the tokens, so its factor must be `reduced`.
        slope = jax.reshard(slope, layout.spec(reduced=layout.token_axes))
    return dx_BTD, sums_DV * slope, None, None


_summed_losses.defvjp(_forward, _backward)


def _in_chunks(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None,
    config: ResolvedModelConfig,
    layout: Layout,
) -> tuple[Losses, tuple[jax.Array, jax.Array] | None]:
    """Returns the losses at each position; given weights, also the gradients of x and of the matrix."""
    vocab_size, smoothing, z = config.vocab_size, config.label_smoothing, config.z_loss
    token_V = jnp.arange(matrix_DV.shape[1], out_sharding=layout.out_sharding("vocabulary"))
    uniform_V = jnp.where(token_V < vocab_size, 1 / vocab_size, 0.0)
    sums_DV = layout.out_sharding(None, "vocabulary", unreduced=layout.token_axes)
    partial_BTD = partial_sums(layout, "vocabulary")

    def add_chunk(
        gradient_DV: Any, x: jax.Array, targets: jax.Array, weights: jax.Array | None = None
    ) -> tuple[Any, Any]:
        scores = logits(x, matrix_DV, config)
        # One-hot by comparison: XLA fuses it, and it shards over V where a gather would not.
        target_V = targets[..., None] == token_V
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        cross_entropy = log_sum - jnp.sum(jnp.where(target_V, scores, 0.0), axis=-1)
        objective = cross_entropy
        if smoothing:
            objective = (1 - smoothing) * cross_entropy + smoothing * (log_sum - jnp.sum(scores * uniform_V, axis=-1))
        if z:
            objective = objective + z * log_sum**2
        losses = Losses(*(layout.reshard(x_BT, "batch", "sequence") for x_BT in (objective, cross_entropy)))
        if weights is None:
            return None, (losses, None)
        # The gradient of the objective by the logits.
        slope = jnp.exp(scores - log_sum[..., None]) * (1 + 2 * z * log_sum[..., None])
        slope = slope - (1 - smoothing) * target_V - smoothing * uniform_V
        slope = slope_of_products(slope, scores, config)
        slope = (slope * weights[..., None]).astype(x.dtype)
        # As in `model.product`, sums are float32, and devices exchange the compute dtype.
        dx = scatter_time(einsum("btv,dv->btd", slope, matrix_DV, partial_BTD).astype(x.dtype), layout)
        return gradient_DV + einsum("btd,btv->dv", x, slope, sums_DV), (losses, dx)

    zeros_DV = None if weights_BT is None else jnp.zeros(matrix_DV.shape, jnp.float32, out_sharding=sums_DV)
    arrays = (x_BTD, targets_BT) if weights_BT is None else (x_BTD, targets_BT, weights_BT)
    gradient_DV, (losses, dx) = _scan_chunks(add_chunk, zeros_DV, arrays, config, layout)
    T = targets_BT.shape[1]
    losses = Losses(*(layout.reshard(_join_chunks(x, T, layout), "batch", "time") for x in losses))
    if gradient_DV is None:
        return losses, None
    # The barrier frees the float32 sums, which else may stay in memory until the last layer's gradient is computed.
    dx, gradient_DV = jax.lax.optimization_barrier((dx, gradient_DV.astype(matrix_DV.dtype)))
    return losses, (_join_chunks(dx, T, layout), gradient_DV)


def _scan_chunks(
    function: Callable[..., Any], carry: Any, arrays: tuple[jax.Array, ...], config: ResolvedModelConfig, layout: Layout
) -> tuple[Any, Any]:
    """`jax.lax.scan` of function(carry, *chunks) over chunks of the positions of arrays [B, T, ...]."""
    B, T = arrays[1].shape
    positions = config.loss_chunk
    if on_one_cpu():
        positions = min(positions, max(CACHED_LOGITS // config.vocab_size, LEAST_CHUNK))
    positions_at_once = max(positions // (B // layout.size("batch")), 1)
    least = -(-(T // layout.size("time")) // positions_at_once)
    # A larger number of chunks that needs no padding is better.
    count = next((count for count in range(least, 2 * least) if T // layout.size("sequence") % count == 0), least)

    def step(carry: Any, chunks: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        return function(carry, *(layout.reshard(x, "batch", "time", *(None,) * (x.ndim - 2)) for x in chunks))

    return jax.lax.scan(step, carry, tuple(_split_chunks(x, count, layout) for x in arrays))


def _split_chunks(x: jax.Array, count: int, layout: Layout) -> jax.Array:
    """Reshapes [B, T, ...] to [count, B, T / count, ...], padded with zeros; each device splits its own positions."""
    B, _, *rest = x.shape
    n, trailing = layout.size("sequence"), (None,) * len(rest)
    x = layout.reshard(x, "batch", "sequence", *trailing)
    x = x.reshape((B, n, -1, *rest), out_sharding=layout.out_sharding("batch", "sequence", None, *trailing))
    if padding := -x.shape[2] % count:
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
    cut = layout.out_sharding("batch", "sequence", None, None, *trailing)
    x = jnp.moveaxis(x.reshape((B, n, count, -1, *rest), out_sharding=cut), 2, 0)
    return x.reshape((count, B, -1, *rest), out_sharding=layout.out_sharding(None, "batch", "sequence", *trailing))


def _join_chunks(chunks: jax.Array, T: int, layout: Layout) -> jax.Array:
    """Reshapes chunks to [B, T, ...]: the inverse of `_split_chunks`."""
    count, B, _, *rest = chunks.shape
    n, trailing = layout.size("sequence"), (None,) * len(rest)
    cut = layout.out_sharding(None, "batch", "sequence", None, *trailing)
    x = jnp.moveaxis(chunks.reshape((count, B, n, -1, *rest), out_sharding=cut), 0, 2)
    x = x.reshape((B, n, -1, *rest), out_sharding=layout.out_sharding("batch", "sequence", None, *trailing))
    x = x[:, :, : T // n]
    return x.reshape((B, T, *rest), out_sharding=layout.out_sharding("batch", "sequence", *trailing))
