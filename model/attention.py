"""Floor 3, masked multi-head self-attention (Vaswani et al. 2017, section 3.2).

Each position looks at itself and what came before, in the same document. K key/value heads serve H query heads: all
(MHA), some (GQA; Ainslie et al. 2023, arXiv:2305.13245) or one (MQA; Shazeer 2019, arXiv:1911.02150).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.dropout import Keys, dropout
from model.linear import Linear
from model.norm import RMSNorm
from model.position import Rotation, rotate
from model.product import product
from model.sharding import UNSHARDED, Layout, join_axis, split_axis

# What a layer tells beside its result: "key" and "value", its new cache.
Aux = dict[str, jax.Array]
Cache = dict[str, jax.Array]
# Queries [B, H, T, C], keys and values [B, K, S, C] and the rows' keys for dropout → [B, H, T, C].
Attend = Callable[[jax.Array, jax.Array, jax.Array, Keys], jax.Array]


def causal_mask(segment_ids_BT: jax.Array, window: int | None = None, layout: Layout = UNSHARDED) -> jax.Array:
    """Which keys a query sees, bool [B, 1, T, S]: not later ones, of its own document alone, the newest `window`.

    Positions are in the order of `layout`, which shares queries, not keys.
    """
    order_T = jnp.asarray(layout.order(segment_ids_BT.shape[1]))
    ago_TS = order_T[:, None] - order_T[None, :]
    same_BTS = segment_ids_BT[:, :, None] == layout.place(segment_ids_BT, "batch", None)[:, None, :]
    return (within(ago_TS, window) & same_BTS)[:, None]


def within(ago: jax.Array, window: int | None) -> jax.Array:
    """Whether a key so many positions ago is seen."""
    return ago >= 0 if window is None else (ago >= 0) & (ago < window)


def attend(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask_B1TS: jax.Array,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    keys_B: Keys = None,
) -> jax.Array:
    """softmax(q·k/√C)·v over the visible keys, softmax in float32 → [B, H, T, C].

    The softmax's denominator divides the sum of values, not each weight (as in FlashAttention; Dao et al. 2022,
    arXiv:2205.14135): T·C divisions for T·S, and a backward pass that sums nothing over the keys.
    """
    scores = _scores(q_BHTC, k_BKSC, mask_B1TS, softcap)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    kept = dropout(weights.astype(v_BKSC.dtype), dropout_rate, keys_B)
    values = product("bkgts,bksc->bkgtc", kept, v_BKSC, dtype=jnp.float32)
    return join_axis((values / jnp.sum(weights, axis=-1, keepdims=True)).astype(v_BKSC.dtype), 1)


def attention_weights(
    q_BHTC: jax.Array, k_BKSC: jax.Array, mask_B1TS: jax.Array, softcap: float | None = None
) -> jax.Array:
    """How much of each key's value a query gathers, float32 [B, H, T, S]: `attend` without the values.

    For looking at: all weights of all heads are there at once.
    """
    return join_axis(jax.nn.softmax(_scores(q_BHTC, k_BKSC, mask_B1TS, softcap), axis=-1), 1)


def _scores(q_BHTC: jax.Array, k_BKSC: jax.Array, mask_B1TS: jax.Array, softcap: float | None) -> jax.Array:
    """q·k/√C, capped, float32 [B, K, G, T, S]; of what a query does not see the lowest number."""
    q_BKGTC = split_axis(q_BHTC, 1, k_BKSC.shape[1])
    scores = product("bkgtc,bksc->bkgts", q_BKGTC, k_BKSC, dtype=jnp.float32) / math.sqrt(q_BHTC.shape[-1])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(mask_B1TS[:, :, None], scores, jnp.finfo(jnp.float32).min)


class Attention(nnx.Module):
    """Queries, keys and values of every head; what each position gathers; and the way back to width D."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], layout: Layout):
        shared = ("model", "kv_heads", "head")
        self.query = Linear("btd,dhc->bhtc", weights, "query", ("model", "heads", "head"), layout)
        self.key = Linear("btd,dkc->bktc", weights, "key", shared, layout)
        self.value = Linear("btd,dkc->bktc", weights, "value", shared, layout)
        self.output = Linear("bhtc,hcd->btd", weights, "output", ("heads", "head", "model"), layout, sums_over="heads")
        self.query_norm = RMSNorm(config, weights["query_norm"]) if config.qk_norm else None
        self.key_norm = RMSNorm(config, weights["key_norm"]) if config.qk_norm else None
        self.config, self.layout = config, layout

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: Rotation,
        attention: Attend,
        cache: Cache | None = None,
        starts_B: jax.Array | None = None,
        keys_B: Keys = None,
    ) -> tuple[jax.Array, Aux]:
        """[B, T, D] → [B, T, D]; `attention` knows who sees whom.

        With a cache of earlier keys and values ("key", "value" [B, K, S, C]), those of `x` are written to it from each
        row's position `starts_B` on and the queries see all of it; the new cache is returned beside.
        """
        x_BTD = self.layout.gather_time(x_BTD, "heads")
        q_BHTC, k_BKTC, v_BKTC = *self.queries_and_keys(x_BTD, rotation), self.value(x_BTD)
        aux: Aux = {}
        if cache is not None:
            assert starts_B is not None
            write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
            k_BKTC = write(cache["key"], k_BKTC, starts_B)
            v_BKTC = write(cache["value"], v_BKTC, starts_B)
            aux = {"key": k_BKTC, "value": v_BKTC}
        return self.output(attention(q_BHTC, k_BKTC, v_BKTC, keys_B)), aux

    def queries_and_keys(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
        """What is compared with what, [B, H, T, C] and [B, K, T, C]."""
        q_BHTC, k_BKTC = self.query(x_BTD), self.key(x_BTD)
        if self.query_norm and self.key_norm:
            q_BHTC, k_BKTC = self.query_norm(q_BHTC), self.key_norm(k_BKTC)
        return rotate(q_BHTC, rotation), rotate(k_BKTC, rotation)

    def weights(self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array) -> jax.Array:
        """Who looks at whom, float32 [B, H, T, T]: see `attention_weights`."""
        q_BHTC, k_BKTC = self.queries_and_keys(self.layout.gather_time(x_BTD, "heads"), rotation)
        return attention_weights(q_BHTC, self.layout.gather_keys(k_BKTC), mask_B1TS, self.config.attention_softcap)

    def largest_logit(self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array) -> jax.Array:
        """The largest |q·k/√C| of a visible key, before any cap, float32: where it grows, training is about to diverge.

        (Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322.)
        """
        q_BHTC, k_BKTC = self.queries_and_keys(self.layout.gather_time(x_BTD, "heads"), rotation)
        q_BHTC = self.layout.place(q_BHTC, "batch", "heads", None, None)
        k_BKTC = self.layout.place(k_BKTC, "batch", "kv_heads", None, None)
        q_TBKGC = jnp.moveaxis(split_axis(q_BHTC, 1, k_BKTC.shape[1]), 3, 0)
        C = q_BHTC.shape[-1]

        def of_query(of: tuple[jax.Array, jax.Array]) -> jax.Array:
            q_BKGC, mask_B1S = of
            scores = jnp.einsum("bkgc,bksc->bkgs", q_BKGC, k_BKTC, preferred_element_type=jnp.float32) / math.sqrt(C)
            return jnp.max(jnp.where(mask_B1S[:, :, None], jnp.abs(scores), 0.0))

        # Some queries at a time: whatever attention itself is computed with, all scores may be more than memory holds.
        return jnp.max(jax.lax.map(of_query, (q_TBKGC, jnp.moveaxis(mask_B1TS, 2, 0)), batch_size=256))
