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
from model.context_parallel import previous_tokens
from model.cpu import ColumnLinear, ColumnUnembedding
from model.decoder import Block, Inputs
from model.embedding import Embedding
from model.kernels import attention_over
from model.layers import LayerKind, layer_kinds
from model.linear import Linear
from model.norm import final_norm
from model.position import Position
from model.sharding import UNSHARDED, Layout
from model.unembedding import Unembedding

# Tokens that a row draws in one call of `decode_steps`, at most.
STEPS_PER_CALL = 8
# The keys and values of a layer: "key" [B, K, C, S], as the product with a query reads them, and "value" [B, K, S, C],
# which latent attention has not, because its values are a part of its keys. Position p is in slot p mod S, so that a
# layer with a window needs no more slots than the window has.
Cache = dict[str, jax.Array]
# The axis of the slots.
SLOT_AXES = {"key": 3, "value": 2}


class CachedDecoder(nnx.Module):
    """`model.decoder.Decoder` over the weights of `decoding_weights`, one block a layer."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, Any], layout: Layout = UNSHARDED):
        on_cpu = platform() == "cpu"
        linear = ColumnLinear if on_cpu else Linear
        unembedding = ColumnUnembedding if on_cpu else Unembedding
        self.config = config
        self.kinds = layer_kinds(config)
        self.layout = layout
        self.embedding = Embedding(config, weights["embedding"], layout)
        self.position = Position(config, weights.get("position"), layout)
        self.blocks = nnx.List(Block(config, layer, layout, linear, cached=True) for layer in weights["blocks"])
        self.norm = final_norm(config, weights)
        self.unembedding = unembedding(config, weights.get("unembedding"), layout)

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """Returns the vectors [B, T, D] of rows, each a document, and the keys and values of all positions."""
        ids_BT = jnp.ones_like(tokens_BT)
        windows = {kind.window for kind in self.kinds}
        attention = {window: attention_over(self.config, self.layout, ids_BT, window) for window in windows}
        cache = []

        def remember(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
            cache.append(self._cached(k, v))
            return attention[self.kinds[layer].window](q, k, v, *rest)

        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        previous_BT = previous_tokens(tokens_BT, ids_BT, self.layout) if self.config.smear else None
        return self._vectors(tokens_BT, previous_BT, positions_BT, remember), cache

    def step(
        self,
        tokens_B1: jax.Array,
        i: jax.Array,
        lengths_B: jax.Array,
        cache: list[Cache],
        recent: list[Cache],
        previous_B1: jax.Array | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """Returns the vectors [B, 1, D] of one more token a row, and `recent` with its keys and values.

        Args:
            i: the number of tokens in `recent`.
            lengths_B: the number of tokens of each row in `cache`.
            cache: keys and values from earlier calls. They stay as they are: in a loop, XLA would copy an array that it
                both reads and extends.
            recent: those of this call, with room for N, in all rows at the same place.
            previous_B1: the token before in each row, for `model.smear`.
        """
        N = recent[0]["key"].shape[3]
        masks = {}
        for kind, earlier in zip(self.kinds, cache, strict=True):
            # Layers with the same window have the same number of slots.
            if kind.window not in masks:
                positions_BS = positions_in(earlier["key"].shape[3], lengths_B)
                mask_BS = (positions_BS >= 0) & visible((lengths_B + i)[:, None] - positions_BS, kind.window)
                mask_BN = jnp.broadcast_to(visible(i - jnp.arange(N), kind.window), (len(lengths_B), N))
                masks[kind.window] = [mask[:, None, None] for mask in (mask_BS, mask_BN)]
        extended = []

        def attention(
            layer: int, q: jax.Array, k: jax.Array, v: jax.Array, keys_B: None, *sinks: jax.Array
        ) -> jax.Array:
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i)
            new = {
                name: write(recent[layer][name], array, axis=SLOT_AXES[name])
                for name, array in self._cached(k, v).items()
            }
            extended.append(new)
            keys = [part["key"].swapaxes(2, 3) for part in (cache[layer], new)]
            parts = zip((cache[layer], new), keys, strict=True)
            values = [part["value"] if "value" in part else key[..., self.config.rope_dim :] for part, key in parts]
            mask = masks[self.kinds[layer].window]
            return attend_to_parts(q, keys, values, mask, self.config.attention_softcap, *sinks)

        return self._vectors(tokens_B1, previous_B1, (lengths_B + i)[:, None], attention), extended

    def _cached(self, k: jax.Array, v: jax.Array) -> Cache:
        """Returns keys and values [B, K, T, C] as the cache has them."""
        key = {"key": k.swapaxes(2, 3)}
        return key if self.config.kv_latent_dim else key | {"value": v}

    def _vectors(
        self,
        tokens_BT: jax.Array,
        previous_BT: jax.Array | None,
        positions_BT: jax.Array,
        attention: Callable[..., jax.Array],
    ) -> jax.Array:
        """Returns the vectors [B, T, D]; `attention` takes the number of the layer before what an Attend takes."""
        x_BTD, rotations = self.position(self.embedding(tokens_BT, previous_BT), positions_BT)
        inputs = Inputs(tokens_BT, x_BTD)
        for layer, (kind, block) in enumerate(zip(self.kinds, self.blocks, strict=True)):
            x_BTD, _ = block(x_BTD, rotations[kind.rope], partial(attention, layer), inputs=inputs)
        return x_BTD if self.norm is None else self.norm(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the scores [B, T, V] of every token as the next one, float32."""
        return self.unembedding(x_BTD, self.embedding.table[...])


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(config: ResolvedModelConfig, batch: int, length: int, layout: Layout = UNSHARDED) -> list[Cache]:
    """Returns room for the keys and values of `length` positions in every layer, or of its window."""
    B, K, C = batch, config.num_kv_heads, config.head_dim
    slots = [num_slots(kind.window, length) for kind in layer_kinds(config)]
    if config.kv_latent_dim:
        sharding = layout.out_sharding("batch", None, None, None)
        shape = (B, 1, config.rope_dim + config.kv_latent_dim)
        return [{"key": jnp.zeros((*shape, S), config.compute_dtype, out_sharding=sharding)} for S in slots]
    sharding = layout.out_sharding("batch", "kv_heads", None, None)
    zeros = lambda *shape: jnp.zeros(shape, config.compute_dtype, out_sharding=sharding)
    return [{"key": zeros(B, K, C, S), "value": zeros(B, K, S, C)} for S in slots]


def num_slots(window: int | None, length: int) -> int:
    """Returns the slots of a layer for `length` positions: at least those that a call of `decode_steps` fills."""
    return length if window is None else min(max(window, STEPS_PER_CALL), length)


def positions_in(S: int, lengths_B: jax.Array) -> jax.Array:
    """Returns the position in each of S slots for rows of these lengths, int32 [B, S]; negative in an empty slot."""
    newest_B1 = lengths_B[:, None] - 1
    return newest_B1 - (newest_B1 - jnp.arange(S)) % S


def newest_of(config: ResolvedModelConfig, cache: list[Cache], lengths_B: jax.Array) -> list[Cache]:
    """Returns the cache of a prefill of T positions in the slots of `empty_cache`, for rows of these lengths."""

    def newest(kind: LayerKind, layer: Cache) -> Cache:
        T = layer["key"].shape[3]
        S = num_slots(kind.window, T)
        if S == T:
            return layer
        positions_BS = jnp.maximum(positions_in(S, lengths_B), 0)
        # Each row on its own, without the axis of rows.
        take = lambda name: jax.vmap(partial(jnp.take, axis=SLOT_AXES[name] - 1))
        return {name: take(name)(array, positions_BS) for name, array in layer.items()}

    return [newest(kind, layer) for kind, layer in zip(layer_kinds(config), cache, strict=True)]


def extended_cache(
    config: ResolvedModelConfig, cache: list[Cache], recent: list[Cache], lengths_B: jax.Array
) -> list[Cache]:
    """Returns the cache with each row's recent keys and values behind those that it has.

    A row that has ended in between must not be continued: its newest places hold what is not there.
    """
    N = recent[0]["key"].shape[3]
    write = {
        "key": jax.vmap(lambda row, slots, new: row.at[:, :, slots].set(new)),
        "value": jax.vmap(lambda row, slots, new: row.at[:, slots].set(new)),
    }

    def extended(earlier: Cache, new: Cache) -> Cache:
        slots_BN = (lengths_B[:, None] + jnp.arange(N)) % earlier["key"].shape[3]
        return {name: write[name](array, slots_BN, new[name]) for name, array in earlier.items()}

    def extended_in_order(earlier: Cache, new: Cache) -> Cache:
        update = lambda name: jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=SLOT_AXES[name] - 1))
        return {name: update(name)(array, new[name], lengths_B) for name, array in earlier.items()}

    return [
        (extended_in_order if kind.window is None else extended)(earlier, new)
        for kind, earlier, new in zip(layer_kinds(config), cache, recent, strict=True)
    ]
