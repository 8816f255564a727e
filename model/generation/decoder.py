"""The decoder as it generates: new tokens attend to a cache of earlier keys and values."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import attend_to_parts, visible
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

# The keys and values of a layer: "key" [B, K, C, S], as the product with a query reads them, and "value" [B, K, S, C].
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

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """Returns the vectors [B, T, D] of rows that are a document each, and their keys and values."""
        attention = attention_over(self.config, self.layout, jnp.ones_like(tokens_BT))
        cache = []

        def remember(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, keys_B: None) -> jax.Array:
            cache.append({"key": k.swapaxes(2, 3), "value": v})
            return attention(q, k, v, keys_B)

        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return self._vectors(tokens_BT, positions_BT, remember), cache

    def step(
        self, tokens_B1: jax.Array, i: jax.Array, lengths_B: jax.Array, cache: list[Cache], recent: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """Returns the vectors [B, 1, D] of one more token a row, and `recent` with its keys and values.

        Args:
            i: the number of tokens in `recent`.
            lengths_B: the number of tokens of each row in `cache`.
            cache: keys and values of S positions, N more than a row may have, from earlier calls. They stay as they
                are: in a loop, XLA would copy an array that it both reads and extends.
            recent: those of this call, with room for N, in all rows at the same place.
        """
        S, N = cache[0]["value"].shape[2], recent[0]["value"].shape[2]
        earlier_BS, new_N = jnp.arange(S) - lengths_B[:, None], jnp.arange(N)
        mask_BS = (earlier_BS < 0) & visible(i - earlier_BS, self.config.sliding_window)
        mask_BN = jnp.broadcast_to(visible(i - new_N, self.config.sliding_window), (len(lengths_B), N))
        masks = [mask[:, None, None] for mask in (mask_BS, mask_BN)]
        extended = []

        def attention(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, keys_B: None) -> jax.Array:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i)
            new = {
                "key": write(recent[layer]["key"], k.swapaxes(2, 3), axis=3),
                "value": write(recent[layer]["value"], v, axis=2),
            }
            extended.append(new)
            parts = cache[layer], new
            keys, values = [part["key"].swapaxes(2, 3) for part in parts], [part["value"] for part in parts]
            return attend_to_parts(q, keys, values, masks, self.config.attention_softcap)

        return self._vectors(tokens_B1, (lengths_B + i)[:, None], attention), extended

    def _vectors(self, tokens_BT: jax.Array, positions_BT: jax.Array, attention: Callable[..., jax.Array]) -> jax.Array:
        """Returns the vectors [B, T, D]; `attention` takes the number of the layer before what an Attend takes."""
        x_BTD, rotation = self.position(self.embedding(tokens_BT), positions_BT)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotation, partial(attention, layer))
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the scores [B, T, V] of every token as the next one, float32."""
        return self.unembedding(x_BTD, self.embedding.table[...])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: ResolvedModelConfig, batch: int, length: int, layout: Layout = UNSHARDED) -> list[Cache]:
    """Returns room for the keys and values of `length` positions in every layer."""
    B, K, C = batch, config.num_kv_heads, config.head_dim
    sharding = layout.out_sharding("batch", "kv_heads", None, None)
    zeros = lambda *shape: jnp.zeros(shape, config.compute_dtype, out_sharding=sharding)
    return [{"key": zeros(B, K, C, length), "value": zeros(B, K, length, C)} for _ in range(config.num_layers)]


def extended_cache(cache: list[Cache], recent: list[Cache], lengths_B: jax.Array) -> list[Cache]:
    """Returns the cache with each row's recent keys and values behind those that it has; there must be room for all."""
    write = lambda axis: jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis))
    return [
        {
            "key": write(2)(earlier["key"], new["key"], lengths_B),
            "value": write(1)(earlier["value"], new["value"], lengths_B),
        }
        for earlier, new in zip(cache, recent, strict=True)
    ]
