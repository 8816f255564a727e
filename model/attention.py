"""Floor 3, masked multi-head self-attention (Vaswani et al. 2017) with grouped queries (GQA; Ainslie et al. 2023).

Each position looks at itself and what came before, in the same document. K key/value heads serve H query heads.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.config import ModelConfig
from model.position import Rotation, rotate
from model.product import product
from model.sharding import Layout

Cache = dict[str, jax.Array]


def causal_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """Which keys a query sees, bool [B, 1, T, S]: not later ones, and those of its own document alone."""
    T = segment_ids_BT.shape[1]
    past_TS = jnp.arange(T)[:, None] >= jnp.arange(T)[None, :]
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return (past_TS & same_BTS)[:, None]


def attend(q_BHTC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_B1TS: jax.Array) -> jax.Array:
    """softmax(q·k/√C)·v over the visible keys, softmax in float32 → [B, H, T, C]."""
    B, H, T, C = q_BHTC.shape
    K = k_BKSC.shape[1]
    q = q_BHTC.reshape(B, K, H // K, T, C)
    scores = jnp.einsum("bkgtc,bksc->bkgts", q, k_BKSC, preferred_element_type=jnp.float32) / math.sqrt(C)
    scores = jnp.where(mask_B1TS[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSC.dtype)
    return jnp.einsum("bkgts,bksc->bkgtc", weights, v_BKSC).reshape(B, H, T, C)


class Attention(nnx.Module):
    """Queries, keys and values of every head; what each position gathers; and the way back to width D."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, jax.Array], layout: Layout):
        self.query = nnx.Param(weights["query"])
        self.key = nnx.Param(weights["key"])
        self.value = nnx.Param(weights["value"])
        self.output = nnx.Param(weights["output"])
        self.layout = layout

    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array, cache: Cache | None, start: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] → [B, T, D].

        With a cache of earlier keys and values ("key", "value" [B, K, S, C]), those of `x` are written to it from
        position `start` on and the queries see all of it; the new cache is returned beside.
        """
        dtype, layout = x_BTD.dtype, self.layout
        w_query = layout.gather(self.query[...].astype(dtype), "model", "heads", "head")
        w_key = layout.gather(self.key[...].astype(dtype), "model", "kv_heads", "head")
        w_value = layout.gather(self.value[...].astype(dtype), "model", "kv_heads", "head")
        w_output = layout.gather(self.output[...].astype(dtype), "heads", "head", "model")

        x_BTD = layout.gather_sequence(x_BTD)
        q_BHTC = rotate(checkpoint_name(product("btd,dhc->bhtc", x_BTD, w_query), "product"), rotation)
        k_BKTC = rotate(checkpoint_name(product("btd,dkc->bktc", x_BTD, w_key), "product"), rotation)
        v_BKTC = checkpoint_name(product("btd,dkc->bktc", x_BTD, w_value), "product")

        if cache is not None:
            assert start is not None
            k_BKTC = jax.lax.dynamic_update_slice_in_dim(cache["key"], k_BKTC, start, axis=2)
            v_BKTC = jax.lax.dynamic_update_slice_in_dim(cache["value"], v_BKTC, start, axis=2)
            cache = {"key": k_BKTC, "value": v_BKTC}

        y_BHTC = attend(q_BHTC, k_BKTC, v_BKTC, mask_B1TS)
        sums_BTD = product("bhtc,hcd->btd", y_BHTC, w_output, layout.partial_sums())
        return checkpoint_name(layout.scatter_sequence(sums_BTD), "product"), cache
