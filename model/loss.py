"""Cross-entropy without the logits of a whole batch: those of a chunk of positions at a time.

With a vocabulary of 200,000 the logits of one batch would outweigh everything else. And each chunk's are made once:
while they are there, they give the chunk's gradients, too, which wait for the backward pass (as in Hsu et al. 2024,
Liger Kernel, arXiv:2410.10989).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.collectives import gather_weight, partial_sums, scatter_time
from model.config import ResolvedModelConfig
from model.product import weight_gradients_first
from model.sharding import UNSHARDED, Layout
from model.unembedding import logits


class Losses(NamedTuple):
    """Float32 nats: at each position [B, T], or summed.

    Attributes:
        objective: what is minimized, -(1 - ε) log p(target) - ε mean(log p) + z · log²(denominator), by
            `model.label_smoothing` ε and `model.z_loss` z.
        cross_entropy: -log p(target), for the record: no gradient comes from it.
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
    """The sums over a batch.

    Args:
        x_BTD: the decoder's output.
        matrix_DV: the unembedding as it is stored, padded to V columns; those from `vocab_size` on have probability
            zero.
        targets_BT: int32 ids.
        weights_BT: float32, how much each position counts.
        config: `loss_chunk` is how many positions' logits one device has at once, at most, but one a row.
        layout: where V is shared, and over which mesh axes the matrix's gradient is summed.
    """
    x_BTD, matrix_DV = weight_gradients_first(x_BTD, matrix_DV)
    return _summed_losses(
        x_BTD, gather_weight(matrix_DV, layout, "model", "vocabulary"), targets_BT, weights_BT, config, layout
    )


def token_losses(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    config: ResolvedModelConfig,
    layout: Layout = UNSHARDED,
) -> Losses:
    """At each position; arguments as of `summed_losses`. Not for gradients, which would need all logits."""
    return _in_chunks(x_BTD, gather_weight(matrix_DV, layout, "model", "vocabulary"), (targets_BT,), config, layout)[0]


def predictions(
    x_BTD: jax.Array,
    matrix_DV: jax.Array,
    targets_BT: jax.Array,
    config: ResolvedModelConfig,
    layout: Layout = UNSHARDED,
) -> tuple[jax.Array, jax.Array]:
    """(log p(target) in float32 nats, whether the target is the first of the likeliest tokens) at each position [B, T].

    Arguments as of `summed_losses`. Not for gradients.
    """
    matrix_DV, vocab_size = gather_weight(matrix_DV, layout, "model", "vocabulary"), config.vocab_size
    token_V = jnp.arange(matrix_DV.shape[1], out_sharding=layout.out_sharding("vocabulary"))

    def of_chunk(_: None, of: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, targets = (layout.reshard(x, "batch", "time", *(None,) * (x.ndim - 2)) for x in of)
        scores = logits(x, matrix_DV, vocab_size)
        target_V = targets[..., None] == token_V
        score = jnp.sum(jnp.where(target_V, scores, 0.0), axis=-1, keepdims=True)
        ahead_V = (scores > score) | ((scores == score) & (token_V < targets[..., None]))
        found = score[..., 0] - jax.nn.logsumexp(scores, axis=-1), ~jnp.any(ahead_V & ~target_V, axis=-1)
        return None, (layout.reshard(found[0], "batch", "sequence"), layout.reshard(found[1], "batch", "sequence"))

    (B, T) = targets_BT.shape
    chunks = _count(B, T, config, layout)
    parts = _chunks(x_BTD, chunks, layout), _chunks(targets_BT, chunks, layout)
    log_p, is_first = (_joined(x, T, layout) for x in jax.lax.scan(of_chunk, None, parts)[1])
    return layout.reshard(log_p, "batch", "time"), layout.reshard(is_first, "batch", "time")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed_losses(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout):  # type: ignore[no-untyped-def]
    losses, _ = _in_chunks(x_BTD, matrix_DV, (targets_BT,), config, layout)
    return _weighted(losses, weights_BT)


def _forward(x_BTD, matrix_DV, targets_BT, weights_BT, config, layout):  # type: ignore[no-untyped-def]
    losses, gradients = _in_chunks(x_BTD, matrix_DV, (targets_BT, weights_BT), config, layout)
    return _weighted(losses, weights_BT), gradients


def _backward(config, layout, gradients, cotangents):  # type: ignore[no-untyped-def]
    dx_BTD, sums_DV = gradients
    slope = cotangents.objective.astype(dx_BTD.dtype)
    unsummed_slope = jax.reshard(slope, layout.spec(reduced=layout.token_axes)) if layout.rules else slope
    return dx_BTD * slope, sums_DV * unsummed_slope, None, None


_summed_losses.defvjp(_forward, _backward)


def _weighted(losses: Losses, weights_BT: jax.Array) -> Losses:
    return Losses(*(jnp.sum(x_BT * weights_BT) for x_BT in losses))


def _in_chunks(
    x_BTD: jax.Array, matrix_DV: jax.Array, rest: tuple[jax.Array, ...], config: ResolvedModelConfig, layout: Layout
) -> tuple[Losses, tuple[jax.Array, jax.Array] | None]:
    """Losses at each position; where `rest` has weights beside the targets, also the gradients of x and the matrix."""
    (B, T), V, vocab_size = rest[0].shape, matrix_DV.shape[1], config.vocab_size
    smoothing, z = config.label_smoothing, config.z_loss
    token_V = jnp.arange(V, out_sharding=layout.out_sharding("vocabulary"))
    uniform_V = jnp.where(token_V < vocab_size, 1 / vocab_size, 0.0)
    sums_DV = layout.out_sharding(None, "vocabulary", unreduced=layout.token_axes)
    partial_BTD = partial_sums(layout, "vocabulary")
    # As in `model.product`: sums are float32, what leaves a device is in the compute dtype.
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_chunk(gradient_DV: jax.Array | None, of: tuple[jax.Array, ...]) -> tuple[jax.Array | None, Any]:
        x, targets, *weights = (layout.reshard(x, "batch", "time", *(None,) * (x.ndim - 2)) for x in of)
        scores = logits(x, matrix_DV, vocab_size)
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
        if gradient_DV is None:
            return None, (losses, None)
        # The slopes by the logits.
        slope = jnp.exp(scores - log_sum[..., None]) * (1 + 2 * z * log_sum[..., None])
        slope = slope - (1 - smoothing) * target_V - smoothing * uniform_V
        slope = (slope * weights[0][..., None]).astype(x.dtype)
        dx = scatter_time(einsum("btv,dv->btd", slope, matrix_DV, out_sharding=partial_BTD).astype(x.dtype), layout)
        return gradient_DV + einsum("btd,btv->dv", x, slope, out_sharding=sums_DV), (losses, dx)

    count = _count(B, T, config, layout)
    zeros_DV = jnp.zeros(matrix_DV.shape, jnp.float32, out_sharding=sums_DV) if len(rest) > 1 else None
    chunks = tuple(_chunks(x, count, layout) for x in (x_BTD, *rest))
    gradient_DV, (losses, dx) = jax.lax.scan(of_chunk, zeros_DV, chunks)
    found = Losses(*(layout.reshard(_joined(x, T, layout), "batch", "time") for x in losses))
    if gradient_DV is None:
        return found, None
    # Both at once: else the float32 sums may stay in memory until the last layer's gradient is there.
    dx, gradient_DV = jax.lax.optimization_barrier((dx, gradient_DV.astype(matrix_DV.dtype)))
    return found, (_joined(dx, T, layout), gradient_DV)


def _count(B: int, T: int, config: ResolvedModelConfig, layout: Layout) -> int:
    """How many chunks the positions of a batch are cut in."""
    rows, positions = B // layout.size("batch"), T // layout.size("time")
    least, own = -(-positions // max(config.loss_chunk // rows, 1)), T // layout.size("sequence")
    # A few chunks more, where they need no filling up.
    return next((count for count in range(least, 2 * least) if own % count == 0), least)


def _chunks(x: jax.Array, count: int, layout: Layout) -> jax.Array:
    """[B, T, ...] → [count, B, T / count, ...], filled up with zeros. Each device cuts its own positions."""
    n, rest = layout.size("sequence"), (None,) * (x.ndim - 2)
    x = layout.reshard(x, "batch", "sequence", *rest)
    x = _reshape(x, (x.shape[0], n, -1, *x.shape[2:]), layout.out_sharding("batch", "sequence", None, *rest))
    if padding := -x.shape[2] % count:
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
    x = _reshape(
        x, (*x.shape[:2], count, -1, *x.shape[3:]), layout.out_sharding("batch", "sequence", None, None, *rest)
    )
    x = jnp.moveaxis(x, 2, 0)
    return _reshape(x, (count, x.shape[1], -1, *x.shape[4:]), layout.out_sharding(None, "batch", "sequence", *rest))


def _joined(chunks: jax.Array, T: int, layout: Layout) -> jax.Array:
    """The inverse of `_chunks`: [B, T, ...]."""
    (count, B), n, rest = chunks.shape[:2], layout.size("sequence"), (None,) * (chunks.ndim - 3)
    cut = layout.out_sharding(None, "batch", "sequence", None, *rest)
    x = jnp.moveaxis(_reshape(chunks, (count, B, n, -1, *chunks.shape[3:]), cut), 0, 2)
    x = _reshape(x, (B, n, -1, *x.shape[4:]), layout.out_sharding("batch", "sequence", None, *rest))[:, :, : T // n]
    return _reshape(x, (B, T, *x.shape[3:]), layout.out_sharding("batch", "sequence", *rest))


def _reshape(x: jax.Array, shape: tuple[int, ...], sharding: PartitionSpec | None) -> jax.Array:
    return jnp.reshape(x, shape, out_sharding=sharding)
