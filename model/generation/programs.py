"""The compiled programs of generation: prefill, decode, and the cache between them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.attention import Cache
from model.config import ModelConfig
from model.decoder import Decoder
from model.generation.sampling import Sampling, draw
from model.sharding import UNSHARDED, Layout

# Tokens that a row draws in one call.
PIECE = 8
# Of a row that does not go on.
NONE = -1


class Place(NamedTuple):
    """Where each row is, int32 [B] each.

    Attributes:
        token: the last one, not read yet; NONE: the row does not go on.
        read: positions that the cache holds.
        number: of its prompt.
        drawn: tokens that it has drawn.
    """

    token: Any
    read: Any
    number: Any
    drawn: Any


class Program(NamedTuple):
    """What `read` and `go_on` are compiled for; both take weights as `prepared`, and the seed of all rows.

    Attributes:
        config: of the model.
        layout: of weights and cache.
        sampling: how to draw.
    """

    config: ModelConfig
    layout: Layout
    sampling: Sampling


def empty_cache(config: ModelConfig, batch: int, context: int, layout: Layout = UNSHARDED) -> list[Cache]:
    """Room for the keys and values of `context` positions in every layer, each [B, K, S, C]."""
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    shape = (batch, config.num_kv_heads, context, config.head_dim)
    sharding = layout.sharding("batch", "kv_heads", None, None)
    zeros = lambda: jnp.zeros(shape, config.compute_dtype, out_sharding=sharding)
    return [{"key": zeros(), "value": zeros()} for _ in range(config.num_layers)]


class State(NamedTuple):
    """What the device keeps of all rows: the cache, and [B, V] which tokens each has had, where that matters."""

    cache: list[Cache]
    had_BV: jax.Array | None


def draw_next(
    decoder: Decoder, x_BTD: jax.Array, at: Place, seed: jax.Array, sampling: Sampling, had_BV: jax.Array | None
) -> jax.Array:
    """Token ids [B] after the last position of x, each row's by the key of (seed, its number, tokens drawn)."""
    logits_BTV = decoder.layout.place(decoder.logits(x_BTD[:, -1:]), "batch", None, None)
    key = jax.random.key(seed)
    keys_B = jax.vmap(lambda number, drawn: jax.random.fold_in(jax.random.fold_in(key, number), drawn))(
        at.number, at.drawn
    )
    return draw(logits_BTV[:, 0], keys_B, sampling, had_BV)


@partial(jax.jit, static_argnums=0)
def read(
    program: Program, weights: Any, seed: jax.Array, at: Place, tokens_1T: jax.Array, had_1V: jax.Array | None
) -> tuple[jax.Array, State]:
    """Read one row's tokens from position 0 on, and draw the next.

    Args:
        program: what is compiled.
        weights: of it.
        seed: of it.
        at: of the row: what it has after these tokens.
        tokens_1T: int32 ids; those behind the first `at.read` are padding, whose place in the cache is written again.
        had_1V: bool, tokens that the row has had.

    Returns:
        The token [1], and the row's state, of T positions.
    """
    config, layout, sampling = program
    decoder = Decoder(config, weights, layout)
    T = tokens_1T.shape[1]
    x_1TD, cache = decoder.extend(tokens_1T, jnp.zeros(1, jnp.int32), empty_cache(config, 1, T, layout))
    x_11D = jax.lax.dynamic_slice_in_dim(x_1TD, at.read[0] - 1, 1, axis=1)
    had_1V = None if had_1V is None else layout.place(had_1V, "batch", None)
    token_1 = draw_next(decoder, x_11D, at, seed, sampling, had_1V)
    return token_1, State(cache, None if had_1V is None else marked(had_1V, token_1))


@partial(jax.jit, donate_argnums=0)
def put(state: State, row: State, slot: jax.Array) -> State:
    """The state with one row's in its slot; the memory of `state` is taken."""
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, slot, axis=0), state, row)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def go_on(
    program: Program, weights: Any, seed: jax.Array, at: Place, state: State, eos_and_limit: jax.Array
) -> tuple[jax.Array, State]:
    """Draw up to PIECE tokens in each row that goes on: until its end, or until its part of the cache is full.

    Args:
        program: what is compiled.
        weights: of it.
        seed: of it.
        at: of all rows.
        state: of all rows; its memory is taken.
        eos_and_limit: int32 [2]: the token after which a row ends, and how many it draws at most.

    Returns:
        Token ids [B, PIECE], NONE where a row has drawn none, and the state.
    """
    config, layout, sampling = program
    decoder, (eos, limit) = Decoder(config, weights, layout), eos_and_limit
    S = state.cache[0]["key"].shape[2]
    going = lambda at: (at.token != NONE) & (at.read < S)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, at, state, tokens_BN = carry
        going_B = going(at)
        x_B1D, cache = decoder.extend(jnp.where(going_B, at.token, 0)[:, None], at.read, state.cache)
        token_B = jnp.where(going_B, draw_next(decoder, x_B1D, at, seed, sampling, state.had_BV), NONE)
        had_BV = None if state.had_BV is None else marked(state.had_BV, token_B)
        drawn_B = at.drawn + going_B
        ended_B = (token_B == eos) | (drawn_B >= limit)
        next_B = jnp.where(going_B, jnp.where(ended_B, NONE, token_B), at.token)
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, i))
        return i + 1, Place(next_B, at.read + going_B, at.number, drawn_B), State(cache, had_BV), tokens_BN

    tokens_BN = jnp.full((len(at.token), PIECE), NONE, jnp.int32)
    begin = (jnp.int32(0), at, state, tokens_BN)
    _, _, state, tokens_BN = jax.lax.while_loop(lambda c: (c[0] < PIECE) & jnp.any(going(c[1])), step, begin)
    return tokens_BN, state


def marked(had_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """With each row's token among those that it has had; NONE adds nothing."""
    return had_BV | (jnp.arange(had_BV.shape[1]) == token_B[:, None])
