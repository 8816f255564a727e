"""Cross-entropy without the logits of a whole batch: a chunk of positions at a time, forward and backward.

With a vocabulary of 200,000 the logits of one batch would outweigh everything else. The forward pass keeps one number
a position (the log of the softmax's denominator); the backward pass makes each chunk's logits again from it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from model.sharding import Layout
from model.unembedding import logits


def _chunks(x: jax.Array, length: int) -> jax.Array:
    """[B, T, ...] → [T / length, B, length, ...]."""
    return x.reshape(x.shape[0], -1, length, *x.shape[2:]).swapaxes(0, 1)


def _joined(chunks: jax.Array) -> jax.Array:
    """The inverse of `_chunks`."""
    x = chunks.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def token_log_probabilities(
    x_BTD: jax.Array, matrix_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int, layout: Layout
) -> jax.Array:
    """log p(target) at each position, float32 [B, T], in nats.

    Args:
        x_BTD: the decoder's output.
        matrix_DV: the unembedding, padded to V columns; those from `vocab_size` on have probability zero.
        targets_BT: int32 ids.
        vocab_size: tokens that exist.
        chunk: positions of a row whose logits exist at once, at most.
        layout: where V is shared, and over which mesh axes the matrix's gradient is summed.
    """
    T = targets_BT.shape[1]
    count = -(-T // chunk)
    length = -(-T // count)
    padding = count * length - T
    if padding:
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    return _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, length, layout)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _log_probabilities(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout):  # type: ignore[no-untyped-def]
    return _forward(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout)[0]


def _target_V(targets_BT: jax.Array, V: int) -> jax.Array:
    """One-hot by comparison: XLA fuses it, and it shards over V where a gather would not."""
    return targets_BT[..., None] == jnp.arange(V)


def _forward(x_BTD, matrix_DV, targets_BT, vocab_size, chunk, layout):  # type: ignore[no-untyped-def]
    def of_chunk(_: None, of: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, targets = of
        scores = logits(x, matrix_DV, vocab_size)
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        score = jnp.sum(jnp.where(_target_V(targets, scores.shape[-1]), scores, 0.0), axis=-1)
        return None, (score - log_sum, log_sum)

    _, (log_p, log_sum) = jax.lax.scan(of_chunk, None, (_chunks(x_BTD, chunk), _chunks(targets_BT, chunk)))
    return _joined(log_p), (x_BTD, matrix_DV, targets_BT, _joined(log_sum))


def _backward(vocab_size, chunk, layout, kept, cotangent_BT):  # type: ignore[no-untyped-def]
    x_BTD, matrix_DV, targets_BT, log_sum_BT = kept
    sums_DV = layout.sharding(None, "vocabulary", unreduced=layout.mesh_axes("batch"))
    whole_BTD = layout.sharding("batch", None, None)

    def of_chunk(gradient_DV: jax.Array, of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, targets, log_sum, cotangent = of
        scores = logits(x, matrix_DV, vocab_size)
        # d log p(target) / d logits = onehot(target) - softmax
        slope = _target_V(targets, scores.shape[-1]) - jnp.exp(scores - log_sum[..., None])
        slope = (slope * cotangent[..., None]).astype(x.dtype)
        # As in `model.product`: sums are float32, what leaves is in the compute dtype.
        float32 = {"preferred_element_type": jnp.float32}
        dx = jnp.einsum("btv,dv->btd", slope, matrix_DV, out_sharding=whole_BTD, **float32).astype(x.dtype)
        return gradient_DV + jnp.einsum("btd,btv->dv", x, slope, out_sharding=sums_DV, **float32), dx

    chunks = tuple(_chunks(x, chunk) for x in (x_BTD, targets_BT, log_sum_BT, cotangent_BT))
    zeros_DV = jnp.zeros(matrix_DV.shape, jnp.float32, out_sharding=sums_DV)
    gradient_DV, dx = jax.lax.scan(of_chunk, zeros_DV, chunks)
    return _joined(dx), gradient_DV.astype(matrix_DV.dtype), None


_log_probabilities.defvjp(_forward, _backward)
