"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel around the devices that share a row.

No device ever holds the keys of a whole row. A device has two of the row's 2n pieces, its front and its back
(`model.context_parallel`), and attends to the pieces of one device after the other, while these travel on. Each result
is merged with those before by the logarithm of its sum of exponentials. The backward pass sends keys and values around
again, and their gradients with them.

A piece of queries sees all keys of another piece, or none. So device i computes, in zigzag order:

    step 0, its own pieces: causal attention, as of a row
    step s, the pieces of device j = i - s: its back to their front; and its front to their front if j < i, else its
        back to their back

Each step after the first is two whole pairs of pieces on every device, and no pair is computed in vain.

Arrays in pieces are [2, B, ...], the front first.
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
    """Attention of rows [R, ...] of queries to as many rows of keys, causal or to all keys, within documents."""

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

    def second(self, step: jax.Array) -> jax.Array:
        """Returns the piece (0 is the front) of both queries and keys in a step's second pair."""
        return jnp.where(step <= jax.lax.axis_index(self.axes), 0, 1)


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
    ids = in_pieces(ids_BT, 1)
    queries = Queries(in_pieces(q_BHTC, 2), ids)
    keys = Keys(in_pieces(k_BKTC, 2), in_pieces(v_BKTC, 2), ids)
    own = kernel.forward(Queries(q_BHTC, ids_BT), Keys(k_BKTC, v_BKTC, ids_BT), True)
    attended = jax.tree.map(lambda x: in_pieces(x.astype(jnp.float32), 2), own)

    def step(s: jax.Array, carry: tuple[Keys, Attended]) -> tuple[Keys, Attended]:
        keys, attended = carry
        # It does not depend on this step's products, so XLA sends while they are computed.
        arriving = ring.send(keys)
        second = ring.second(s)
        parts = kernel.forward(_pair(queries, 1, second), _pair(keys, 0, second), False)
        of_first, of_second = _halves(parts)
        return arriving, _merge(_merge(attended, 1, of_first), second, of_second)

    _, attended = jax.lax.fori_loop(1, ring.size, step, (ring.send(keys), attended))
    if sink_H is not None:
        total = jnp.logaddexp(attended.logsumexp, sink_H.astype(jnp.float32)[:, None])
        attended = Attended(attended.y * jnp.exp(attended.logsumexp - total)[..., None], total)
    y_BHTC = checkpoint_name(_in_row(attended.y, 2).astype(v_BKTC.dtype), "attention")
    logsumexp_BHT = checkpoint_name(_in_row(attended.logsumexp, 2), "attention")
    return y_BHTC, (q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H, y_BHTC, logsumexp_BHT)


def _backward(kernel, ring, kept, gradient_BHTC):  # type: ignore[no-untyped-def]
    q_BHTC, k_BKTC, v_BKTC, ids_BT, sink_H, y_BHTC, logsumexp_BHT = kept
    ids = in_pieces(ids_BT, 1)
    attended = Attended(in_pieces(y_BHTC, 2), in_pieces(logsumexp_BHT, 2))
    ours = (Queries(in_pieces(q_BHTC, 2), ids), attended, in_pieces(gradient_BHTC, 2))
    keys = Keys(in_pieces(k_BKTC, 2), in_pieces(v_BKTC, 2), ids)

    def gradients(ours: Any, keys: Keys, is_causal: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        queries, attended, gradient = ours
        dq, dk, dv = kernel.backward(queries, keys, is_causal, attended, gradient)
        return dq, (dk, dv)

    own = (Queries(q_BHTC, ids_BT), Attended(y_BHTC, logsumexp_BHT), gradient_BHTC)
    own_gradients = gradients(own, Keys(k_BKTC, v_BKTC, ids_BT), True)
    dq, dkv = jax.tree.map(lambda x: in_pieces(x.astype(jnp.float32), 2), own_gradients)

    def step(s: jax.Array, carry: tuple[Keys, Any, jax.Array]) -> tuple[Keys, Any, jax.Array]:
        keys, dkv, dq = carry
        arriving, dkv = ring.send((keys, dkv))
        second = ring.second(s)
        parts = gradients(_pair(ours, 1, second), _pair(keys, 0, second), False)
        (of_q, of_kv), (of_second_q, of_second_kv) = _halves(parts)
        dq = _add(_add(dq, 1, of_q), second, of_second_q)
        return arriving, _add(_add(dkv, 0, of_kv), second, of_second_kv), dq

    _, dkv, dq = jax.lax.fori_loop(1, ring.size, step, (ring.send(keys), dkv, dq))
    dk, dv = ring.send(dkv)  # home
    dsink = None
    if sink_H is not None:
        share_BHT = jnp.exp(sink_H.astype(jnp.float32)[:, None] - logsumexp_BHT)
        dsink = -jnp.sum(share_BHT * _row_sums(y_BHTC, gradient_BHTC), axis=(0, 2)).astype(sink_H.dtype)
    back = zip((dq, dk, dv), (q_BHTC, k_BKTC, v_BKTC), strict=True)
    return *(_in_row(x, 2).astype(like.dtype) for x, like in back), None, dsink


ring_attention.defvjp(_forward, _backward)


def in_pieces(x: jax.Array, axis: int) -> jax.Array:
    """Returns a device's positions at an axis as its two pieces, [2, ...]."""
    return jnp.stack(jnp.split(x, 2, axis))


def _in_row(x: jax.Array, axis: int) -> jax.Array:
    """Returns the two pieces one after the other at an axis."""
    return jnp.concatenate([x[0], x[1]], axis)


def _piece(tree: Any, piece: int | jax.Array) -> Any:
    return jax.tree.map(lambda x: x[piece], tree)


def _pair(tree: Any, first: int, second: jax.Array) -> Any:
    """Returns two pieces, which may be the same, as rows [2B, ...]."""
    return jax.tree.map(lambda x: jnp.concatenate([x[first], x[second]]), tree)


def _halves(tree: Any) -> tuple[Any, Any]:
    """Returns the first and the second half of the rows."""
    middle = jax.tree.leaves(tree)[0].shape[0] // 2
    return jax.tree.map(lambda x: x[:middle], tree), jax.tree.map(lambda x: x[middle:], tree)


def _add(tree: Any, piece: int | jax.Array, parts: Any) -> Any:
    return jax.tree.map(lambda x, part: x.at[piece].add(part.astype(x.dtype)), tree, parts)


def _merge(attended: Attended, piece: int | jax.Array, part: Attended) -> Attended:
    """Adds the result over further keys to that of a piece of queries."""
    before = _piece(attended, piece)
    total = jnp.logaddexp(before.logsumexp, part.logsumexp)
    shares = (jnp.exp(x.logsumexp - total)[..., None] for x in (before, part))
    y = before.y * next(shares) + part.y.astype(jnp.float32) * next(shares)
    return Attended(attended.y.at[piece].set(y), attended.logsumexp.at[piece].set(total))


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

        kernel = self._kernel(queries, is_causal)

        def of_row(queries: Queries, keys: Keys) -> Attended:
            y, (logsumexp,) = kernel(queries.q, keys.k, keys.v, kernels.SegmentIds(queries.ids, keys.ids))
            return Attended(y, logsumexp)

        return self._named(of_row, queries, is_causal)(queries, keys)

    def backward(
        self, queries: Queries, keys: Keys, is_causal: bool, attended: Attended, gradient: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Implements `PieceKernel.backward`."""
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

        kernel = self._kernel(queries, is_causal)

        def of_row(queries: Queries, keys: Keys, attended: Attended, gradient: jax.Array) -> tuple[jax.Array, ...]:
            ids = kernels.SegmentIds(queries.ids, keys.ids)
            masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
            kept = (queries.q, keys.k, keys.v, ids, None, attended.y, attended.logsumexp, *masks)
            # JAX's function for the gradient of its own result: given the result and the sum of exponentials of the
            # whole row, it gives the part of these keys. No public function takes them.
            return kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=gradient)[3:6]

        dq, dk, dv = self._named(of_row, queries, is_causal)(queries, keys, attended, gradient)
        return dq, dk, dv

    def _kernel(self, queries: Queries, is_causal: bool) -> Any:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        _, H, T, _ = queries.q.shape
        mask = masks.CausalMask((T, T)) if is_causal else masks.FullMask((T, T))
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * H),
            block_sizes=self.block_sizes(T),
            save_residuals=True,
            attn_logits_soft_cap=self.softcap,
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )

    def _named(self, of_row: Callable[..., Any], queries: Queries, is_causal: bool) -> Callable[..., Any]:
        """Returns the function over rows, whose operations have the name that `model.kernels` explains."""
        pairs = self.causal_pairs if is_causal else queries.q.shape[2] ** 2
        return jax.named_scope(f"attention_pairs_{pairs}")(jax.vmap(of_row))
