"""Floor 3, masked multi-head self-attention (Vaswani et al. 2017, section 3.2).

Each position attends to itself and to earlier positions of the same document. H query heads share K key/value heads:
K = H is multi-head attention, fewer are grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), and one is
multi-query attention (Shazeer 2019, arXiv:1911.02150).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.collectives import gather_keys, gather_time
from model.config import ResolvedModelConfig
from model.context_parallel import zigzag_order
from model.dropout import DropoutKeys, dropout
from model.embedding import gated
from model.linear import Linear
from model.norm import Norm
from model.position import Rotation, rotate
from model.product import product
from model.sharding import UNSHARDED, Layout, is_whole, join_axis, split_axis

# A function of queries [B, H, T, C], keys and values [B, K, S, C], dropout keys and, in a model that has them, sinks
# [H]; it returns [B, H, T, C].
Attend = Callable[..., jax.Array]


def causal_mask(segment_ids_BT: jax.Array, window: int | None = None, layout: Layout = UNSHARDED) -> jax.Array:
    """True where a query may attend to a key, bool [B, 1, T, S]: earlier or the same, of its document, in the window.

    Queries and keys are in `zigzag_order`; the layout shards the queries, not the keys.
    """
    order_T = jnp.asarray(zigzag_order(segment_ids_BT.shape[1], layout))
    distance_TS = order_T[:, None] - order_T[None, :]
    same_document_BTS = segment_ids_BT[:, :, None] == layout.reshard(segment_ids_BT, "batch", None)[:, None, :]
    return (visible(distance_TS, window) & same_document_BTS)[:, None]


def visible(distance: jax.Array, window: int | None) -> jax.Array:
    """True where a key `distance` positions back may be attended to."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask_B1TS: jax.Array,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    keys_B: DropoutKeys = None,
    sink_H: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q·k/√C)·v over the visible keys, [B, H, T, C]; the softmax is computed in float32.

    A sink is one more score of each query, without a value. The softmax's denominator divides the sum of values, not
    each weight (as in FlashAttention; Dao et al. 2022, arXiv:2205.14135): T·C divisions instead of T·S, and no sum over
    the keys in the backward pass.
    """
    (weights,), total = _exponentials([_visible_scores(q_BHTC, k_BKSC, mask_B1TS, softcap)], sink_H)
    kept = dropout(weights.astype(v_BKSC.dtype), dropout_rate, keys_B)
    values = product("bkgts,bksc->bkgtc", kept, v_BKSC, dtype=jnp.float32)
    return join_axis((values / total()).astype(v_BKSC.dtype), 1)


def attend_to_parts(
    q_BHTC: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    softcap: float | None = None,
    sink_H: jax.Array | None = None,
) -> jax.Array:
    """Returns `attend` over keys, values and masks that are in several arrays, without concatenating the keys."""
    pairs = zip(keys, masks, strict=True)
    visible_scores = [_visible_scores(q_BHTC, k_BKSC, mask_B1TS, softcap) for k_BKSC, mask_B1TS in pairs]
    weights, total = _exponentials(visible_scores, sink_H)
    sums = [
        product("bkgts,bksc->bkgtc", part.astype(v_BKSC.dtype), v_BKSC, dtype=jnp.float32)
        for part, v_BKSC in zip(weights, values, strict=True)
    ]
    return join_axis((functools.reduce(jnp.add, sums) / total()).astype(values[0].dtype), 1)


def _exponentials(
    parts: Sequence[jax.Array], sink_H: jax.Array | None = None
) -> tuple[list[jax.Array], Callable[[], jax.Array]]:
    """Returns the exponentials of scores [B, K, G, T, S] in several arrays, and a function to their sum, with the sink.

    They are divided by that of the largest score.
    """
    largest = functools.reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in parts])
    sink_KG11 = None
    if sink_H is not None:
        sink_KG = split_axis(sink_H, 0, parts[0].shape[1], is_whole(parts[0], 1))
        sink_KG11 = sink_KG[:, :, None, None].astype(jnp.float32)
        largest = jnp.maximum(largest, sink_KG11)
    largest = jax.lax.stop_gradient(largest)
    weights = [jnp.exp(part - largest) for part in parts]

    def total() -> jax.Array:
        sums = functools.reduce(jnp.add, [jnp.sum(part, axis=-1, keepdims=True) for part in weights])
        return sums if sink_KG11 is None else sums + jnp.exp(sink_KG11 - largest)

    return weights, total


def attention_weights(
    q_BHTC: jax.Array,
    k_BKSC: jax.Array,
    mask_B1TS: jax.Array,
    softcap: float | None = None,
    sink_H: jax.Array | None = None,
) -> jax.Array:
    """Returns the weight of each key's value in `attend`, float32 [B, H, T, S].

    For inspection: the weights of all heads and positions are in memory at once.
    """
    (weights,), total = _exponentials([_visible_scores(q_BHTC, k_BKSC, mask_B1TS, softcap)], sink_H)
    return join_axis(weights / total(), 1)


def scores(q_BHTC: jax.Array, k_BKSC: jax.Array, softcap: float | None) -> jax.Array:
    """Returns q·k/√C, capped, float32 [B, K, G, T, S]."""
    q_BKGTC = split_axis(q_BHTC, 1, k_BKSC.shape[1], is_whole(k_BKSC, 1))
    scores_BKGTS = product("bkgtc,bksc->bkgts", q_BKGTC, k_BKSC, dtype=jnp.float32) * (1 / math.sqrt(q_BHTC.shape[-1]))
    return scores_BKGTS if softcap is None else softcap * jnp.tanh(scores_BKGTS / softcap)


def _visible_scores(q_BHTC: jax.Array, k_BKSC: jax.Array, mask_B1TS: jax.Array, softcap: float | None) -> jax.Array:
    """Returns `scores`, and the lowest number where the mask is False."""
    return jnp.where(mask_B1TS[:, :, None], scores(q_BHTC, k_BKSC, softcap), jnp.finfo(jnp.float32).min)


class Attention(nnx.Module):
    """The projections to queries, keys and values, attention in every head, and the projection back to width D.

    With `attention_gate` each head's output is multiplied by σ(w·x), where x is the input of the projections: the
    headwise gate of Qiu et al. 2025, arXiv:2505.06708.
    """

    def __init__(
        self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout, linear: type[Linear] = Linear
    ):
        self.query = linear("btd,dhc->bhtc", weights, "query", ("model", "heads", "head"), layout)
        if config.kv_latent_dim is None:
            kv_axes = ("model", "kv_heads", "head")
            self.key = linear("btd,dkc->bktc", weights, "key", kv_axes, layout)
            self.value = linear("btd,dkc->bktc", weights, "value", kv_axes, layout)
        self.output = linear("bhtc,hcd->btd", weights, "output", ("heads", "head", "model"), layout, sums_over="heads")
        # The axes of queries [B, H, T, C] that are normed together.
        axes = (-1,) if config.qk_norm_over == "head" else (-3, -1)
        self.query_norm = Norm(config, weights["query_norm"], axes=axes) if config.qk_norm else None
        self.key_norm = Norm(config, weights["key_norm"], axes=axes) if config.qk_norm else None
        self.sink = nnx.Param(weights["sink"]) if config.attention_sinks else None
        # In the compute dtype whatever the other products are in.
        gate = ("btd,dh->bht", weights, "head_gate", ("model", "heads"), layout)
        self.head_gate = Linear(*gate) if config.attention_gate else None
        self.config = config
        self.layout = layout

    def __call__(
        self,
        x_BTD: jax.Array,
        rotation: Rotation,
        attention: Attend,
        keys_B: DropoutKeys = None,
        value_embedding: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] to [B, T, D].

        Args:
            attention: applies the mask to queries, keys and values.
            value_embedding: function of the input of the projections to what is added to values.
        """
        sinks = () if self.sink is None else (self.sink[...],)
        x_BTD = self.gathered(x_BTD)
        q_BHTC, k_BKTC, v_BKTC = self.heads(x_BTD, rotation)
        if value_embedding:
            v_BKTC = v_BKTC + value_embedding(x_BTD)
        y_BHTC = self.mixed(attention(q_BHTC, k_BKTC, v_BKTC, keys_B, *sinks))
        if self.head_gate:
            y_BHTC = gated(y_BHTC, jax.nn.sigmoid(self.head_gate(x_BTD).astype(jnp.float32)))
        return self.output(y_BHTC)

    def gathered(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the input of the projections, of all positions that the devices which share heads have."""
        return gather_time(x_BTD, self.layout, "heads")

    def heads(self, x_BTD: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, H, T, C] and keys [B, K, T, C], of products to divide by √C; and values."""
        q_BHTC, k_BKTC = self.query(x_BTD), self.key(x_BTD)
        if self.query_norm and self.key_norm:
            q_BHTC, k_BKTC = self.query_norm(q_BHTC), self.key_norm(k_BKTC)
        return rotate(self.scaled(q_BHTC), rotation), rotate(k_BKTC, rotation), self.value(x_BTD)

    def mixed(self, y_BHTC: jax.Array) -> jax.Array:
        """Returns what the projection back takes of each head's weighted sum of values."""
        return y_BHTC

    def scaled(self, q_BHTC: jax.Array) -> jax.Array:
        """Returns queries whose products, divided by √C as all kernels do, have the factor `attention_scale`."""
        if self.config.attention_scale is None:
            return q_BHTC
        factor = self.config.attention_scale * math.sqrt(q_BHTC.shape[-1])
        return (q_BHTC.astype(jnp.float32) * factor).astype(q_BHTC.dtype)

    def weights(self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array) -> jax.Array:
        """Returns the float32 weights [B, H, T, T] of `attention_weights`."""
        q_BHTC, k_BKTC, _ = self.heads(self.gathered(x_BTD), rotation)
        sink_H = None if self.sink is None else self.sink[...]
        k_BKSC = gather_keys(k_BKTC, self.layout)
        return attention_weights(q_BHTC, k_BKSC, mask_B1TS, self.config.attention_softcap, sink_H)

    def largest_logit(self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array) -> jax.Array:
        """Returns the largest |q·k/√C| of a visible key, before any cap, float32.

        Its growth precedes divergence (Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322).
        """
        q_BHTC, k_BKTC, _ = self.heads(self.gathered(x_BTD), rotation)
        q_BHTC = self.layout.reshard(q_BHTC, "batch", "heads", None, None)
        k_BKTC = self.layout.reshard(k_BKTC, "batch", "kv_heads", None, None)
        q_TBKGC = jnp.moveaxis(split_axis(q_BHTC, 1, k_BKTC.shape[1]), 3, 0)
        C = q_BHTC.shape[-1]

        def largest_of_query(query: tuple[jax.Array, jax.Array]) -> jax.Array:
            q_BKGC, mask_B1S = query
            scores = jnp.einsum("bkgc,bksc->bkgs", q_BKGC, k_BKTC, preferred_element_type=jnp.float32) / math.sqrt(C)
            return jnp.max(jnp.where(mask_B1S[:, :, None], jnp.abs(scores), 0.0))

        # In batches of queries, because the scores of all may not fit in memory.
        return jnp.max(jax.lax.map(largest_of_query, (q_TBKGC, jnp.moveaxis(mask_B1TS, 2, 0)), batch_size=256))
