"""Attention on a CPU: in blocks of queries, with a gradient of its own."""

import jax
import jax.numpy as jnp

from model.attention import scores
from model.product import einsum, gradient_sharding, product
from model.sharding import join_axis

# Blocks of queries, and the fewest queries of one.
MOST_BLOCKS, LEAST_BLOCK = 4, 256


def attend_in_blocks(
    q_BHTC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_B1TS: jax.Array, softcap: float | None = None
) -> jax.Array:
    """`model.attention.attend`, in blocks of queries, each over the keys that the causal mask may leave visible.

    With four blocks that is five eighths of the scores. On other platforms a kernel does the same.
    """
    T = q_BHTC.shape[2]
    block = max(T // MOST_BLOCKS, LEAST_BLOCK)
    if T % block:
        block = T
    values = []
    for end in range(block, T + 1, block):
        queries = slice(end - block, end)
        scores_BKGTS = scores(q_BHTC[:, :, queries], k_BKSC[:, :, :end], softcap)
        values.append(_attend_block(scores_BKGTS, mask_B1TS[:, :, None, queries, :end], v_BKSC[:, :, :end]))
    return join_axis(jnp.concatenate(values, axis=3), 1)


@jax.custom_vjp
def _attend_block(scores_BKGTS: jax.Array, mask_B11TS: jax.Array, v_BKSC: jax.Array) -> jax.Array:
    """Returns the softmax of the visible scores times the values, [B, K, G, T, C].

    The gradient needs neither the mask nor the scores again: the weight of a hidden key is zero.
    """
    return _attend_block_forward(scores_BKGTS, mask_B11TS, v_BKSC)[0]


def _attend_block_forward(scores_BKGTS, mask_B11TS, v_BKSC):  # type: ignore[no-untyped-def]
    scores_BKGTS = jnp.where(mask_B11TS, scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores_BKGTS - jnp.max(scores_BKGTS, axis=-1, keepdims=True)).astype(v_BKSC.dtype)
    total = _sum_of_rows(weights)
    values = (product("bkgts,bksc->bkgtc", weights, v_BKSC, dtype=jnp.float32) / total).astype(v_BKSC.dtype)
    return values, (weights, total, values, v_BKSC)


def _attend_block_backward(kept, gradient):  # type: ignore[no-untyped-def]
    weights, total, values, v_BKSC = kept
    gradient = gradient.astype(jnp.float32)
    of_sum = (gradient / total).astype(v_BKSC.dtype)  # the gradient of the sum of values, before its division
    of_total = -_sum_of_rows(gradient * values.astype(jnp.float32)) / total
    of_weights = product("bkgtc,bksc->bkgts", of_sum, v_BKSC, dtype=jnp.float32) + of_total
    of_v = einsum("bkgts,bkgtc->bksc", weights, of_sum, gradient_sharding(v_BKSC)).astype(v_BKSC.dtype)
    return weights.astype(jnp.float32) * of_weights, None, of_v


_attend_block.defvjp(_attend_block_forward, _attend_block_backward)


def _sum_of_rows(x: jax.Array) -> jax.Array:
    """Returns the sums of the last axis, float32 [..., 1], as a matrix product.

    XLA's CPU compiler fuses any other sum with what uses it, and computes it again for each element there.
    """
    ones = jnp.ones((x.shape[-1], 8), x.dtype)  # with fewer columns it would become a sum
    return jnp.matmul(x, ones, preferred_element_type=jnp.float32)[..., :1]
