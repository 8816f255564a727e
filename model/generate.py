"""Generation: the model continues a prompt, one token at a time, with a cache of earlier keys and values."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.attention import Cache
from model.config import ModelConfig
from model.decoder import Decoder
from model.sharding import WHOLE, Layout


def empty_cache(config: ModelConfig, batch: int, context: int, layout: Layout = WHOLE) -> Cache:
    """Room for the keys and values of `context` positions in every layer, each [L, B, K, S, C]."""
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    shape = (config.num_layers, batch, config.num_kv_heads, context, config.head_dim)
    sharding = layout.sharding(None, "batch", "kv_heads", None, None)
    return {name: jnp.zeros(shape, config.compute_dtype, out_sharding=sharding) for name in ("key", "value")}


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=4)
def next_logits(
    config: ModelConfig, weights: Any, tokens_BT: jax.Array, start_and_last: jax.Array, cache: Cache, layout: Layout
) -> tuple[jax.Array, Cache]:
    """Read tokens behind what the cache holds.

    Args:
        config: of the model.
        weights: the nested dictionary.
        tokens_BT: int32 ids; those behind the last real one are padding, whose place in the cache is written again.
        start_and_last: int32 [2]: the position of the first token, and the index in T of the last real one.
        cache: of the positions before; its memory is taken.
        layout: of weights and cache.

    Returns:
        Float32 logits [B, V] of what follows the last real token, and the cache.
    """
    start, last = start_and_last
    decoder = Decoder(config, weights, layout)
    x_BTD, extended = decoder.extend(tokens_BT, start, cache)
    x_B1D = jax.lax.dynamic_slice_in_dim(x_BTD, last, 1, axis=1)
    return layout.place(decoder.logits(x_B1D), "batch", None, None)[:, 0], extended


@partial(jax.jit, static_argnums=(2, 3))
def sample(logits_BV: jax.Array, key: jax.Array, top_k: int, temperature: float) -> jax.Array:
    """Draw token ids [B] from softmax(logits / temperature) among the `top_k` most likely; temperature 0: the first.

    `top_k` 0 means all.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    if top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1)


def generate(
    config: ModelConfig,
    weights: Any,
    prompt: Sequence[int],
    *,
    context: int,
    eos_id: int,
    max_new_tokens: int,
    top_k: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    layout: Layout = WHOLE,
) -> Iterator[int]:
    """Continue a prompt; yields token ids as they are drawn, and ends before EOS.

    The model sees at most `context` positions. When they are full it goes on from the newer half of them, read anew
    from position 0 (so what it sees is always a segment as in training). A prompt longer than the context keeps its
    newest part. The same seed gives the same tokens.
    """
    key = jax.random.key(seed)
    seen = list(prompt)[-context:] or [eos_id]
    cache = empty_cache(config, 1, context, layout)
    unread, start = seen, 0
    for i in range(max_new_tokens):
        # Padded to a power of two, so that prompts of all lengths share a few compiled programs.
        length = min(1 << (len(unread) - 1).bit_length(), context - start)
        tokens = jnp.array([unread + [0] * (length - len(unread))], jnp.int32)
        place = jnp.array([start, len(unread) - 1], jnp.int32)
        logits_BV, cache = next_logits(config, weights, tokens, place, cache, layout)
        token = int(sample(logits_BV, jax.random.fold_in(key, i), top_k, temperature)[0])
        if token == eos_id:
            return
        yield token
        start += len(unread)
        unread = [token]
        seen.append(token)
        if start == context:
            seen = seen[-max(context // 2, 1) :]
            unread, start = seen, 0
