"""The decoder as it generates: new tokens attend to a cache of earlier keys and values."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import attend, visible
from model.backend import platform
from model.config import ResolvedModelConfig
from model.cpu import ColumnLinear, ColumnUnembedding
from model.decoder import Block
from model.embedding import Embedding
from model.kernels import attention_over
from model.linear import Linear
from model.norm import final_norm
from model.position import Position
from model.sharding import UNSHARDED, Layout
from model.unembedding import Unembedding

# The keys and values of a layer: "key", "value" [B, K, S, C].
Cache = dict[str, jax.Array]


class CachedDecoder(nnx.Module):
    """`model.decoder.Decoder` over the weights of `decoding_weights`, one block a layer."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout = UNSHARDED):
        on_cpu = platform() == "cpu"
        linear = ColumnLinear if on_cpu else Linear
        unembedding = ColumnUnembedding if on_cpu else Unembedding
        self.config = config
        self.layout = layout
        self.embedding = Embedding(config, weights["embedding"], layout)
        self.position = Position(config, weights.get("position"), layout)
        self.blocks = nnx.List(Block(config, layer, layout, linear) for layer in weights["blocks"])
        self.norm = final_norm(config, weights)
        self.unembedding = unembedding(config, weights.get("unembedding"), layout)

    def __call__(self, tokens_BT: jax.Array, starts_B: jax.Array, cache: list[Cache]) -> tuple[jax.Array, list[Cache]]:
        """Returns the vectors [B, T, D] of T more tokens a row, and the cache with their keys and values.

        Args:
            tokens_BT: int32 ids; a row is one document.
            starts_B: int32, the position of each row's first token.
            cache: keys and values of each layer. With S = T nothing comes before the tokens.
        """
        T, S = tokens_BT.shape[1], cache[0]["key"].shape[2]
        positions_BT = starts_B[:, None] + jnp.arange(T)
        if S == T:
            attention = attention_over(self.config, self.layout, jnp.ones_like(tokens_BT))
        else:
            distance_B1TS = positions_BT[:, None, :, None] - jnp.arange(S)
            mask_B1TS = visible(distance_B1TS, self.config.sliding_window)
            attention = lambda q, k, v, keys_B: attend(q, k, v, mask_B1TS, self.config.attention_softcap)
        write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
        extended = []

        def cached_attention(earlier: Cache, q: jax.Array, k: jax.Array, v: jax.Array, keys_B: None) -> jax.Array:
            k = write(earlier["key"], k, starts_B)
            v = write(earlier["value"], v, starts_B)
            extended.append({"key": k, "value": v})
            return attention(q, k, v, keys_B)

        x_BTD, rotation = self.position(self.embedding(tokens_BT), positions_BT)
        for block, earlier in zip(self.blocks, cache, strict=True):
            x_BTD = block(x_BTD, rotation, partial(cached_attention, earlier))
        return x_BTD if self.norm is None else self.norm(x_BTD), extended

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the scores [B, T, V] of every token as the next one, float32."""
        return self.unembedding(x_BTD, self.embedding.table[...])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: ResolvedModelConfig, batch: int, context: int, layout: Layout = UNSHARDED) -> list[Cache]:
    """Returns room for the keys and values of `context` positions in every layer, each [B, K, S, C]."""
    shape = (batch, config.num_kv_heads, context, config.head_dim)
    sharding = layout.out_sharding("batch", "kv_heads", None, None)
    zeros = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=sharding)
    return [{"key": zeros(), "value": zeros()} for _ in range(config.num_layers)]
