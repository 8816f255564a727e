"""Cross-entropy without the logits of a whole batch: a chunk of positions at a time, forward and backward.

With a vocabulary of 200,000 the logits of one batch would outweigh everything else. The forward pass keeps one number
a position (the log of the softmax's denominator); the backward pass makes each chunk's logits again from it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.sharding import Layout
from model.unembedding import logits


def _chunks(x: jax.Array, length: int, layout: Layout) -> jax.Array:
    """[B, T, ...] → [T / length, B, length, ...]."""
    chunks = x.reshape(x.shape[0], -1, length, *x.shape[2:])
    # A reshape forgets on which axis the shards of a single row are.
    return layout.place(chunks, "batch", *(None,) * (chunks.ndim - 1)).swapaxes(0, 1)


def _joined(chunks: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `_chunks`."""
    x = chunks.swapaxes(0, 1)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return layout.place(x, "batch", *(None,) * (x.ndim - 1))


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
        matrix_DV: the unembedding, padded to V columns; those from `vocab_size` on have probability zero.
        targets_BT: int32 ids.
        vocab_size: tokens that exist.
        chunk: positions on one device whose logits exist at once, at most, but one a row.
        layout: where V is shared, and over which mesh axes the matrix's gradient is summed.
    """
    T = targets_BT.shape[1]
    sharding = jax.typeof(x_BTD).sharding
    rows = x_BTD.shape[0] if sharding.mesh.empty else sharding.shard_shape(x_BTD.shape)[0]
    count = -(-T // max(chunk // rows, 1))
    length = -(-T // count)
    padding = count * length - T
    if padding:
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    found = _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, length, layout)
    return LogProbabilities(*(x_BT[:, :T] for x_BT in found))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout):  # type: ignore[no-untyped-def]
    return _forward(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout)[0]


def _target_V(targets_BT: jax.Array, V: int) -> jax.Array:
    """One-hot by comparison: XLA fuses it, and it shards over V where a gather would not."""
    return targets_BT[..., None] == jnp.arange(V)


def _forward(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout):  # type: ignore[no-untyped-def]
    real_V = jnp.arange(matrix_DV.shape[1]) < vocab_size

    def of_chunk(_: None, of: tuple[jax.Array, ...]) -> tuple[None, LogProbabilities]:
        x, targets = of
        scores = logits(x, matrix_DV, vocab_size)
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        score = jnp.sum(jnp.where(_target_V(targets, scores.shape[-1]), scores, 0.0), axis=-1)
        mean = jnp.sum(jnp.where(real_V, scores, 0.0), axis=-1) / vocab_size
        return None, LogProbabilities(score - log_sum, mean - log_sum, log_sum)

    _, chunks = jax.lax.scan(of_chunk, None, tuple(_chunks(x, chunk, layout) for x in (x_BTD, targets_BT)))
    found = LogProbabilities(*(_joined(x, layout) for x in chunks))
    return found, (x_BTD, matrix_DV, targets_BT, found.log_sum)


def _backward(vocab_size, chunk, layout, kept, cotangents):  # type: ignore[no-untyped-def]
    x_BTD, matrix_DV, targets_BT, log_sum_BT = kept
    sums_DV = layout.sharding(None, "vocabulary", unreduced=layout.mesh_axes("batch"))
    partial_BTD = layout.sharding("batch", None, None, unreduced=layout.mesh_axes("vocabulary"))
    uniform_V = jnp.where(jnp.arange(matrix_DV.shape[1]) < vocab_size, 1 / vocab_size, 0.0)

    def of_chunk(gradient_DV: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, targets, log_sum, *cotangent = of
        of_target, of_mean, of_log_sum = (c[..., None] for c in cotangent)
        scores = logits(x, matrix_DV, vocab_size)
        softmax = jnp.exp(scores - log_sum[..., None])
        # The slopes by the logits of their three terms: one-hot, uniform, softmax.
        slope = _target_V(targets, scores.shape[-1]) * of_target + uniform_V * of_mean
        slope = (slope + softmax * (of_log_sum - of_target - of_mean)).astype(x.dtype)
        # As in `model.product`: sums are float32, what leaves a device is in the compute dtype.
        einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
        dx = einsum("btv,dv->btd", slope, matrix_DV, out_sharding=partial_BTD).astype(x.dtype)
        dx = layout.place(dx, "batch", None, None)
        return gradient_DV + einsum("btd,btv->dv", x, slope, out_sharding=sums_DV), dx

    chunks = tuple(_chunks(x, chunk, layout) for x in (x_BTD, targets_BT, log_sum_BT, *cotangents))
    zeros_DV = jnp.zeros(matrix_DV.shape, jnp.float32, out_sharding=sums_DV)
    gradient_DV, dx = jax.lax.scan(of_chunk, zeros_DV, chunks)
    return _joined(dx, layout), gradient_DV.astype(matrix_DV.dtype), None


_log_probabilities.defvjp(_forward, _backward)
