"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel around the devices that share a row.

No device ever holds the keys of a whole row. A device has two of the row's 2n pieces, its front and its back
(`model.context_parallel`), and attends to the pieces of one device after the other, while these travel on. Each result
is merged with those before by the logarithm of its sum of exponentials. The backward pass sends keys and values around
again, and their gradients with them.

A piece of queries sees all keys of another piece, or none. So device i computes, in zigzag order:

    step 0, its own pieces: causal attention, as of a row
    step s, the pieces of device j = i - s: both of its own to their front if j < i, else its back to both of theirs

Each step after the first is two whole pairs of pieces on every device, and no pair is computed in vain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from model.attention import scores
from model.product import product


class Queries(NamedTuple):
    """Queries [..., H, T, C] and their documents [..., T]."""

    q: jax.Array
    ids: jax.Array


class Keys(NamedTuple):
    """Keys and values [..., K, T, C], and their documents [..., T]."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array


class Attended(NamedTuple):
    """Attention's result [..., H, T, C], and the logarithm of each query's sum of exponentials, float32 [..., H, T]."""

    y: jax.Array
    logsumexp: jax.Array


class PieceKernel(Protocol):
    """Attention of rows [R, ...] of queries to as many rows of keys, causal or to all keys, within documents.

    Rows of queries and keys are equally long if it is causal; else one of the two may be twice as long.
    """

    def forward(self, queries: Queries, keys: Keys, is_causal: bool) -> Attended:
        """Returns the softmax over these keys alone times their values."""

    def backward(
        self, queries: Queries, keys: Keys, is_causal: bool, attended: Attended, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what these keys add to the gradients of q, k and v, given the result over all keys of the queries."""


class Ring(NamedTuple):
    """The mesh axes whose devices share a row, and the number of these devices."""

    axes: tuple[str, ...]
    size: int

    def send(self, arrays: Any, by: int = 1) -> Any:
        """Sends arrays to the next device, or by -1 to the one before, and returns those that arrive from the other."""
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, pairs), arrays)

    def is_ahead(self, step: jax.Array) -> jax.Array:
        """Returns True where this device comes after the one whose keys it has at a step."""
        return step <= jax.lax.axis_index(self.axes)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring_attention(
    kernel: PieceKernel,
    ring: Ring,
    q_BHTC: jax.Array,
    k_BKTC: jax.Array,
    v_BKTC: jax.Array,
    ids_BT: jax.Array,
    sink_H: jax.Array | None,
) -> jax.Array:
    """Returns causal attention within documents to all keys of the row, [B, H, T, C], inside `jax.shard_map`.

    Args:
        ids_BT: the documents of the positions that this device has, in zigzag order as all arrays.
        sink_H: one more score of each query, without a value, or None.
    """
    return _forward(kernel, ring, q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H)[0]


def _forward(kernel, ring, q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H):  # type: ignore[no-untyped-def]
    queries, keys = Queries(q_BHTC, ids_BT), Keys(k_BKTC, v_BKTC, ids_BT)
    back = _half(queries, 1)
    own = jax.tree.map(lambda x: x.astype(jnp.float32), kernel.forward(queries, keys, True))

    def step(s: jax.Array, carry: tuple[Keys, Attended]) -> tuple[Keys, Attended]:
        keys, attended = carry
        # It does not depend on this step's products, so XLA sends while they are computed.
        arriving = ring.send(keys)

        def to_front(before: Attended) -> Attended:
            return _merge(before, kernel.forward(queries, _half(keys, 0), False))

        def from_back(before: Attended) -> Attended:
            return _with_back(before, _merge(_half(before, 1), kernel.forward(back, keys, False)))

        return arriving, jax.lax.cond(ring.is_ahead(s), to_front, from_back, attended)

    _, attended = jax.lax.fori_loop(1, ring.size, step, (ring.send(keys), own))
    if sink_H is not None:
        total = jnp.logaddexp(attended.logsumexp, sink_H.astype(jnp.float32)[:, None])
        attended = Attended(attended.y * jnp.exp(attended.logsumexp - total)[..., None], total)
    y_BHTC = checkpoint_name(attended.y.astype(v_BKTC.dtype), "attention")
    logsumexp_BHT = checkpoint_name(attended.logsumexp, "attention")
    return y_BHTC, (q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H, y_BHTC, logsumexp_BHT)


def _backward(kernel, ring, kept, gradient_BHTC):  # type: ignore[no-untyped-def]
    q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H, y_BHTC, logsumexp_BHT = kept
    keys = Keys(k_BKTC, v_BKTC, ids_BT)
    ours = (Queries(q_BHTC, ids_BT), Attended(y_BHTC, logsumexp_BHT), gradient_BHTC)
    back = _half(ours, 1)

    def gradients(ours: Any, keys: Keys, is_causal: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        queries, attended, gradient = ours
        dq, dk, dv = (x.astype(jnp.float32) for x in kernel.backward(queries, keys, is_causal, attended, gradient))
        return dq, (dk, dv)

    dq, dkv = gradients(ours, keys, True)

    def step(s: jax.Array, carry: tuple[Keys, Any, jax.Array]) -> tuple[Keys, Any, jax.Array]:
        keys, dkv, dq = carry
        arriving, dkv = ring.send((keys, dkv))

        def to_front(dq: jax.Array) -> tuple[jax.Array, Any]:
            of_q, of_front = gradients(ours, _half(keys, 0), False)
            return dq + of_q, jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x)], axis=2), of_front)

        def from_back(dq: jax.Array) -> tuple[jax.Array, Any]:
            of_back, of_kv = gradients(back, keys, False)
            return _with_back(dq, _half(dq, 1) + of_back), of_kv

        dq, of_kv = jax.lax.cond(ring.is_ahead(s), to_front, from_back, dq)
        # The sums of others are added last, so that they too are sent while this device computes.
        return arriving, jax.tree.map(jnp.add, dkv, of_kv), dq

    _, dkv, dq = jax.lax.fori_loop(1, ring.size, step, (ring.send(keys), dkv, dq))
    dk, dv = ring.send(dkv)  # home
    dsink = None
    if sink_H is not None:
        share_BHT = jnp.exp(sink_H.astype(jnp.float32)[:, None] - logsumexp_BHT)
        dsink = -jnp.sum(share_BHT * _row_sums(y_BHTC, gradient_BHTC), axis=(0, 2)).astype(sink_H.dtype)
    totals = zip((dq, dk, dv), (q_BHTC, k_BKTC, v_BKTC), strict=True)
    return *(x.astype(like.dtype) for x, like in totals), None, dsink


ring_attention.defvjp(_forward, _backward)


def _half(tree: Any, half: int) -> Any:
    """Returns one of a device's two pieces (0 is the front) of arrays [B, T] or [B, H, T, ...]."""

    def of(x: jax.Array) -> jax.Array:
        axis = min(x.ndim - 1, 2)
        return jnp.split(x, 2, axis)[half]

    return jax.tree.map(of, tree)


def _with_back(tree: Any, back: Any) -> Any:
    """Returns arrays [B, H, T, ...] with another back piece."""

    def of(x: jax.Array, piece: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, piece, piece.shape[2], axis=2)

    return jax.tree.map(of, tree, back)


def _merge(before: Attended, further: Attended) -> Attended:
    """Returns the result over the keys of both, in float32."""
    total = jnp.logaddexp(before.logsumexp, further.logsumexp)
    shares = (jnp.exp(x.logsumexp - total)[..., None] for x in (before, further))
    y = before.y * next(shares) + further.y.astype(jnp.float32) * next(shares)
    return Attended(y, total)


def _row_sums(y_BHTC: jax.Array, gradient_BHTC: jax.Array) -> jax.Array:
    """Returns the sums over the keys of a weight times its gradient, float32 [B, H, T]: those of y times its own."""
    return jnp.sum(y_BHTC.astype(jnp.float32) * gradient_BHTC.astype(jnp.float32), axis=-1)


@dataclass(frozen=True)
class PlainPieces:
    """Plain attention, with a score in memory for every pair of positions."""

    softcap: float | None

    def forward(self, queries: Queries, keys: Keys, is_causal: bool) -> Attended:
        """Implements `PieceKernel.forward`."""
        largest = jnp.max(self._scores(queries, keys, is_causal), axis=-1)
        y, total = self._sums(queries, keys, is_causal, largest)
        return Attended(y / total[..., None], jnp.log(total) + largest.reshape(total.shape))

    def backward(
        self, queries: Queries, keys: Keys, is_causal: bool, attended: Attended, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Implements `PieceKernel.backward`."""
        K = keys.k.shape[1]
        logsumexp_RKGT = attended.logsumexp.reshape(attended.logsumexp.shape[0], K, -1, attended.logsumexp.shape[2])

        def sums(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._sums(Queries(q, queries.ids), Keys(k, v, keys.ids), is_causal, logsumexp_RKGT)

        _, pull = jax.vjp(sums, queries.q, keys.k, keys.v)
        # The weights of all keys of the row sum to 1, which takes this from each score's gradient.
        return pull((gradient.astype(jnp.float32), -_row_sums(attended.y, gradient)))

    def _scores(self, queries: Queries, keys: Keys, is_causal: bool) -> jax.Array:
        """Returns the scores of visible keys, and the lowest number for others, float32 [R, K, G, T, S]."""
        mask_RTS = queries.ids[:, :, None] == keys.ids[:, None, :]
        if is_causal:
            mask_RTS &= jnp.tri(mask_RTS.shape[1], mask_RTS.shape[2], dtype=bool)
        return jnp.where(mask_RTS[:, None, None], scores(queries.q, keys.k, self.softcap), jnp.finfo(jnp.float32).min)

    def _sums(
        self, queries: Queries, keys: Keys, is_causal: bool, largest_RKGT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the sums of values [R, H, T, C] and of exponentials [R, H, T], divided by that of `largest`."""
        weights = jnp.exp(self._scores(queries, keys, is_causal) - largest_RKGT[..., None])
        values = product("bkgts,bksc->bkgtc", weights.astype(keys.v.dtype), keys.v, dtype=jnp.float32)
        R, H, T, _ = queries.q.shape
        return values.reshape(R, H, T, -1), jnp.sum(weights, axis=-1).reshape(R, H, T)


@dataclass(frozen=True)
class SplashPieces:
    """Pallas splash attention (TPU) of scaled queries.

    Attributes:
        block_sizes: a function from the number of positions to splash attention's `BlockSizes`.
        causal_pairs: pairs of positions that it visits in a causal row, for a plan.
    """

    softcap: float | None
    block_sizes: Callable[[int], Any]
    causal_pairs: int
    interpret: bool

    def forward(self, queries: Queries, keys: Keys, is_causal: bool) -> Attended:
        """Implements `PieceKernel.forward`."""
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

        kernel = self._kernel(queries, keys, is_causal)

        def of_row(queries: Queries, keys: Keys) -> Attended:
            y, (logsumexp,) = kernel(queries.q, keys.k, keys.v, kernels.SegmentIds(queries.ids, keys.ids))
            return Attended(y, logsumexp)

        return self._named(of_row, queries, keys, is_causal)(queries, keys)

    def backward(
        self, queries: Queries, keys: Keys, is_causal: bool, attended: Attended, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Implements `PieceKernel.backward`."""
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

        kernel = self._kernel(queries, keys, is_causal)

        def of_row(queries: Queries, keys: Keys, attended: Attended, gradient: jax.Array) -> tuple[jax.Array, ...]:
            ids = kernels.SegmentIds(queries.ids, keys.ids)
            masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
            kept = (queries.q, keys.k, keys.v, ids, None, attended.y, attended.logsumexp, *masks)
            # JAX's function for the gradient of its own result: given the result and the sum of exponentials of the
            # whole row, it gives the part of these keys. No public function takes them.
            return kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=gradient)[3:6]

        dq, dk, dv = self._named(of_row, queries, keys, is_causal)(queries, keys, attended, gradient)
        return dq, dk, dv

    def _kernel(self, queries: Queries, keys: Keys, is_causal: bool) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        (_, H, T, _), S = queries.q.shape, keys.k.shape[2]
        mask = masks.CausalMask((T, S)) if is_causal else masks.FullMask((T, S))
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            block_sizes=self.block_sizes(min(T, S)),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )

    def _named(self, of_row: Callable[..., Any], queries: Queries, keys: Keys, is_causal: bool) -> Callable[..., Any]:
        """Returns the function over rows, whose operations have the name that `model.kernels` explains."""
        pairs = self.causal_pairs if is_causal else queries.q.shape[2] * keys.k.shape[2]
        return jax.named_scope(f"attention_pairs_{pairs}")(jax.vmap(of_row))
