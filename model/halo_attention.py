"""Attention in a window over shared positions: each piece of a row needs only the end of the piece before it.

Such an end is called a halo. Where the n devices of `model.context_parallel` share a row, device i has the pieces i,
its front, and 2n - 1 - i, its back. The piece before the front is the front of device i - 1, and the piece before the
back is the back of device i + 1, but the last device's own front.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.attention import attend, visible
from model.ring_attention import Keys, Queries, Ring

# A function of rows of queries, the keys before and among them, and sinks; it returns [R, H, T, C].
AttendToHalo = Callable[..., jax.Array]


def halo_attention(
    attend_to_halo: AttendToHalo, ring: Ring, halo: int, queries: Queries, keys: Keys, *sinks: jax.Array
) -> jax.Array:
    """Returns attention in a window, [B, H, T, C], inside `jax.shard_map`.

    Args:
        halo: the number of keys before a piece that its queries get; at most all of a piece.
        queries: those of a device, in zigzag order as all arrays.
    """
    rows = Queries(_as_rows(_in_pieces(queries.q, 2)), _as_rows(_in_pieces(queries.ids, 1)))
    k, v, ids = (_with_halo(x, ring, axis, halo) for x, axis in ((keys.k, 2), (keys.v, 2), (keys.ids, 1)))
    # There is nothing before the first piece of a row, and no document has this number.
    is_first = (jnp.arange(2) == 0) & (jax.lax.axis_index(ring.axes) == 0)
    hides = is_first[:, None, None] & (jnp.arange(ids.shape[2]) < halo)
    before_and_among = Keys(_as_rows(k), _as_rows(v), _as_rows(jnp.where(hides, -1, ids)))
    y = attend_to_halo(rows, before_and_among, *sinks)
    front, back = jnp.split(y, 2)
    return jnp.concatenate([front, back], axis=2)


def _in_pieces(x: jax.Array, axis: int) -> jax.Array:
    """Returns a device's positions at an axis as its two pieces, [2, ...], the front first."""
    return jnp.stack(jnp.split(x, 2, axis))


def _with_halo(x: jax.Array, ring: Ring, axis: int, halo: int) -> jax.Array:
    """Returns a device's two pieces [2, ...], each behind the last positions of the piece before it."""
    pieces = _in_pieces(x, axis)
    fronts_end, backs_end = jax.lax.slice_in_dim(pieces, pieces.shape[axis + 1] - halo, None, axis=axis + 1)
    is_last = jax.lax.axis_index(ring.axes) == ring.size - 1
    before_back = jnp.where(is_last, fronts_end, ring.send(backs_end, -1))
    return jnp.concatenate([jnp.stack([ring.send(fronts_end), before_back]), pieces], axis=axis + 1)


def _as_rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def plain_halo(window: int, softcap: float | None) -> AttendToHalo:
    """Returns plain attention to the newest `window` keys, in documents."""

    def attend_to_halo(queries: Queries, keys: Keys, *sinks: jax.Array) -> jax.Array:
        T, S = queries.q.shape[2], keys.k.shape[2]
        distance_TS = jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)
        mask_RTS = visible(distance_TS, window) & (queries.ids[:, :, None] == keys.ids[:, None])
        return attend(queries.q, keys.k, keys.v, mask_RTS[:, None], softcap, 0.0, None, *sinks)

    return attend_to_halo


def splash_halo(window: int, softcap: float | None, block_sizes: Any, pairs: int, interpret: bool) -> AttendToHalo:
    """Returns Pallas splash attention of scaled queries to the newest `window` keys, in documents.

    Args:
        block_sizes: splash attention's `BlockSizes`, which divide the queries and the halo.
        pairs: pairs of positions that it visits for a row of queries, for a plan.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    @jax.named_scope(f"attention_pairs_{pairs}")
    def attend_to_halo(queries: Queries, keys: Keys, *sinks: jax.Array) -> jax.Array:
        _, H, T, _ = queries.q.shape
        S = keys.k.shape[2]
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.LocalMask((T, S), (window - 1, 0), offset=S - T)] * H),
            block_sizes=block_sizes,
            attn_logits_soft_cap=softcap,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )

        def of_row(queries: Queries, keys: Keys) -> jax.Array:
            ids = kernels.SegmentIds(queries.ids, keys.ids)
            return kernel(queries.q, keys.k, keys.v, ids, *(sink.astype(jnp.float32) for sink in sinks))

        return jax.vmap(of_row)(queries, keys)

    return attend_to_halo
