"""Cross-entropy without the logits of a whole batch: a chunk of positions at a time, forward and backward.

With a vocabulary of 200,000 the logits of one batch would outweigh everything else. The forward pass keeps one number
a position (the log of the softmax's denominator); the backward pass makes each chunk's logits again from it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.product import in_turn
from model.sharding import Layout
from model.unembedding import logits


def _chunks(x: jax.Array, count: int, layout: Layout) -> jax.Array:
    """[B, T, ...] → [count, B, T / count, ...], filled up with zeros. Each device cuts its own positions."""
    n, rest = layout.size("sequence"), (None,) * (x.ndim - 2)
    x = layout.place(x, "batch", "sequence", *rest)
    x = _reshape(x, (x.shape[0], n, -1, *x.shape[2:]), layout.sharding("batch", "sequence", None, *rest))
    if padding := -x.shape[2] % count:
        x = jnp.pad(x, [(0, padding if axis == 2 else 0) for axis in range(x.ndim)])
    x = _reshape(x, (*x.shape[:2], count, -1, *x.shape[3:]), layout.sharding("batch", "sequence", None, None, *rest))
    x = jnp.moveaxis(x, 2, 0)
    return _reshape(x, (count, x.shape[1], -1, *x.shape[4:]), layout.sharding(None, "batch", "sequence", *rest))


def _joined(chunks: jax.Array, T: int, layout: Layout) -> jax.Array:
    """The inverse of `_chunks`: [B, T, ...]."""
    (count, B), n, rest = chunks.shape[:2], layout.size("sequence"), (None,) * (chunks.ndim - 3)
    cut = layout.sharding(None, "batch", "sequence", None, *rest)
    x = jnp.moveaxis(_reshape(chunks, (count, B, n, -1, *chunks.shape[3:]), cut), 0, 2)
    x = _reshape(x, (B, n, -1, *x.shape[4:]), layout.sharding("batch", "sequence", None, *rest))[:, :, : T // n]
    return _reshape(x, (B, T, *x.shape[3:]), layout.sharding("batch", "sequence", *rest))


def _reshape(x: jax.Array, shape: tuple[int, ...], sharding: PartitionSpec | None) -> jax.Array:
    return jnp.reshape(x, shape, out_sharding=sharding)


class LogProbabilities(NamedTuple):
    """What the loss is made of, each float32 [B, T] in nats.

    Attributes:
        target: log p(target).
        mean: of log p over all tokens: what label smoothing adds.
        log_sum: log of the softmax's denominator: what the z-loss squares.
    """

    target: jax.Array
    mean: jax.Array
    log_sum: jax.Array


def token_log_probabilities(
    x_BTD: jax.Array, matrix_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int, layout: Layout
) -> LogProbabilities:
    """The log-probabilities at each position.

    Args:
        x_BTD: the decoder's output.
        matrix_DV: the unembedding as it is stored, padded to V columns; those from `vocab_size` on have probability
            zero.
        targets_BT: int32 ids.
        vocab_size: tokens that exist.
        chunk: positions on one device whose logits exist at once, at most, but one a row.
        layout: where V is shared, and over which mesh axes the matrix's gradient is summed.
    """
    B, T = targets_BT.shape
    rows, positions = B // layout.size("batch"), T // layout.size("time")
    least, own = -(-positions // max(chunk // rows, 1)), T // layout.size("sequence")
    # A few chunks more, where they need no filling up.
    count = next((count for count in range(least, 2 * least) if own % count == 0), least)
    x_BTD, matrix_DV = in_turn(x_BTD, matrix_DV)
    matrix_DV = layout.gather(matrix_DV, "model", "vocabulary")
    found = _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, count, layout)
    return LogProbabilities(*(layout.place(x_BT, "batch", "time") for x_BT in found))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, count, layout):  # type: ignore[no-untyped-def]
    return _forward(x_BTD, matrix_DV, targets_BT, vocab_size, count, layout)[0]


def _whole(x: jax.Array, layout: Layout) -> jax.Array:
    """The positions of a chunk for all devices that share the vocabulary."""
    return layout.place(x, "batch", "time", *(None,) * (x.ndim - 2))


def _target_V(targets_BT: jax.Array, V: int) -> jax.Array:
    """One-hot by comparison: XLA fuses it, and it shards over V where a gather would not."""
    return targets_BT[..., None] == jnp.arange(V)


def _forward(x_BTD, matrix_DV, targets_BT, vocab_size, count, layout):  # type: ignore[no-untyped-def]
    real_V = jnp.arange(matrix_DV.shape[1]) < vocab_size

    def of_chunk(_: None, of: tuple[jax.Array, ...]) -> tuple[None, LogProbabilities]:
        x, targets = (_whole(x, layout) for x in of)
        scores = logits(x, matrix_DV, vocab_size)
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        score = jnp.sum(jnp.where(_target_V(targets, scores.shape[-1]), scores, 0.0), axis=-1)
        mean = jnp.sum(jnp.where(real_V, scores, 0.0), axis=-1) / vocab_size
        found = LogProbabilities(score - log_sum, mean - log_sum, log_sum)
        return None, LogProbabilities(*(layout.place(x_BT, "batch", "sequence") for x_BT in found))

    _, chunks = jax.lax.scan(of_chunk, None, tuple(_chunks(x, count, layout) for x in (x_BTD, targets_BT)))
    found = LogProbabilities(*(_joined(x, targets_BT.shape[1], layout) for x in chunks))
    return found, (x_BTD, matrix_DV, targets_BT, found.log_sum)


def _backward(vocab_size, count, layout, kept, cotangents):  # type: ignore[no-untyped-def]
    x_BTD, matrix_DV, targets_BT, log_sum_BT = kept
    sums_DV = layout.sharding(None, "vocabulary", unreduced=layout.tokens)
    partial_BTD = layout.partial_sums("vocabulary")
    uniform_V = jnp.where(jnp.arange(matrix_DV.shape[1]) < vocab_size, 1 / vocab_size, 0.0)

    def of_chunk(gradient_DV: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, targets, log_sum, *cotangent = (_whole(x, layout) for x in of)
        of_target, of_mean, of_log_sum = (c[..., None] for c in cotangent)
        scores = logits(x, matrix_DV, vocab_size)
        softmax = jnp.exp(scores - log_sum[..., None])
        # The slopes by the logits of their three terms: one-hot, uniform, softmax.
        slope = _target_V(targets, scores.shape[-1]) * of_target + uniform_V * of_mean
        slope = (slope + softmax * (of_log_sum - of_target - of_mean)).astype(x.dtype)
        # As in `model.product`: sums are float32, what leaves a device is in the compute dtype.
        einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dx = einsum("btv,dv->btd", slope, matrix_DV, out_sharding=partial_BTD).astype(x.dtype)
        dx = layout.scatter_time(dx)
        return gradient_DV + einsum("btd,btv->dv", x, slope, out_sharding=sums_DV), dx

    chunks = tuple(_chunks(x, count, layout) for x in (x_BTD, targets_BT, log_sum_BT, *cotangents))
    zeros_DV = jnp.zeros(matrix_DV.shape, jnp.float32, out_sharding=sums_DV)
    gradient_DV, dx = jax.lax.scan(of_chunk, zeros_DV, chunks)
    # Both at once: else the float32 sums may stay in memory until the last layer's gradient is there.
    dx, gradient_DV = jax.lax.optimization_barrier((dx, gradient_DV.astype(matrix_DV.dtype)))
    return _joined(dx, targets_BT.shape[1], layout), gradient_DV, None


_log_probabilities.defvjp(_forward, _backward)
