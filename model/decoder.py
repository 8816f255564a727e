"""The decoder: the five floors, with attention and feed-forward stacked L times (pre-norm, RMSNorm)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import Attention, Cache, causal_mask
from model.config import ModelConfig
from model.embedding import Embedding
from model.feedforward import FeedForward
from model.position import Rotation, rotation
from model.sharding import WHOLE, Layout
from model.unembedding import Unembedding, logits

REMAT_POLICIES = {
    # What the forward pass leaves for the backward pass; the rest is computed again.
    "products": jax.checkpoint_policies.save_only_these_names("product"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + ε) · scale, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, jax.Array]):
        self.scale = nnx.Param(weights["scale"])
        self.epsilon = config.norm_epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, D], in the dtype of x."""
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...]).astype(x_BTD.dtype)


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], layout: Layout):
        self.attention_norm = RMSNorm(config, weights["attention_norm"])
        self.attention = Attention(config, weights["attention"], layout)
        self.feedforward_norm = RMSNorm(config, weights["feedforward_norm"])
        self.feedforward = FeedForward(config, weights["feedforward"], layout)

    def __call__(
        self, x_BTD: jax.Array, rotation: Rotation, mask_B1TS: jax.Array, cache: Cache | None, start: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] → [B, T, D], and the layer's new cache."""
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), rotation, mask_B1TS, cache, start)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.feedforward(self.feedforward_norm(x_BTD)), cache


class Decoder(nnx.Module):
    """The model over a nested dictionary of weights (see `model.parameters`); it holds no other state.

    Building one costs nothing but time to trace, so a training step builds it from the weights that it is given.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], layout: Layout = WHOLE):
        self.config = config
        self.layout = layout
        self.embedding = Embedding(config, weights["embedding"], layout)
        self.blocks = Block(config, weights["blocks"], layout)  # one block, its weights stacked [L, ...]
        self.norm = RMSNorm(config, weights["norm"])
        self.unembedding = Unembedding(config, weights.get("unembedding", {}).get("matrix"), layout)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """Token ids → the vectors [B, T, D] that predict each position's next token.

        Args:
            tokens_BT: int32 ids.
            positions_BT: int32 places in their documents.
            segment_ids_BT: int32; positions with different numbers do not see each other.
        """
        return self._run(tokens_BT, positions_BT, causal_mask(segment_ids_BT))[0]

    def extend(self, tokens_BT: jax.Array, start: jax.Array, cache: Cache) -> tuple[jax.Array, Cache | None]:
        """As `__call__` for the T tokens of one document that follow the first `start`, which the cache holds.

        Args:
            tokens_BT: int32 ids.
            start: int32 scalar, the position of the first of them.
            cache: "key" and "value" of all layers, each [L, B, K, S, C], S the longest context.
        """
        positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        mask_B1TS = positions_BT[:, None, :, None] >= jnp.arange(cache["key"].shape[3])
        return self._run(tokens_BT, positions_BT, mask_B1TS, cache, start)

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        mask_B1TS: jax.Array,
        cache: Cache | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        x_BTD = self.embedding(tokens_BT)
        angles = rotation(self.config, positions_BT)
        structure, stacked = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, of_layer: tuple[nnx.State, Cache | None]) -> tuple[jax.Array, Cache | None]:
            weights, layer_cache = of_layer
            return nnx.merge(structure, weights)(x_BTD, angles, mask_B1TS, layer_cache, start)

        if self.config.remat_policy != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.config.remat_policy], prevent_cse=False)
        x_BTD, cache = jax.lax.scan(layer, x_BTD, (stacked, cache))
        return self.layout.place(self.norm(x_BTD), "batch", None, None), cache

    def unembedding_matrix(self) -> jax.Array:
        """The last floor's weight [D, V] in the compute dtype; V is the padded vocabulary."""
        return self.unembedding.weight(self.embedding.table[...], jnp.dtype(self.config.compute_dtype))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores [B, T, V] of every token as the next one. For a whole batch use `model.loss`, which makes none."""
        assert self.config.vocab_size is not None
        return logits(x_BTD, self.unembedding_matrix(), self.config.vocab_size)
