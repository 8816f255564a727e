"""The compiled programs of generation: prefill, insertion of a row, and decode steps."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from model.config import ResolvedModelConfig
from model.generation.decoder import STEPS_PER_CALL, Cache, CachedDecoder, empty_cache, extended_cache, newest_of
from model.generation.sampling import Sampling, sample
from model.sharding import Layout

# In place of a token: the row is empty, has ended, or draws nothing in this step.
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledModel:
    """A model and the way in which its tokens are drawn, as all programs take them.

    Attributes:
        weights: the arrays of `decoding_weights`.
    """

    config: ResolvedModelConfig = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})
    sampling: Sampling = field(metadata={"static": True})
    weights: Any
    seed: Any


class RowState(NamedTuple):
    """The progress of each row, int32 [B] each.

    Attributes:
        token: the newest token, which the cache doesn't hold yet, or NO_TOKEN in a row that is empty or has ended.
        previous: the token before it, for `model.smear`; else None.
    """

    token: Any
    cache_length: Any
    prompt_index: Any
    num_drawn: Any
    previous: Any = None


class DecodeState(NamedTuple):
    """The arrays that stay on the devices between calls.

    Attributes:
        cache: STEPS_PER_CALL positions longer than a row may become, which is where a full row's last call writes.
        seen_BV: True for tokens of a row's prompt or continuation; None without a repetition penalty.
    """

    cache: list[Cache]
    seen_BV: jax.Array | None


@jax.jit
def prefill(model: SampledModel, length_1: jax.Array, tokens_1T: jax.Array) -> tuple[jax.Array, list[Cache]]:
    """Reads one row's tokens from position 0 on.

    Args:
        length_1: the number of its tokens, int32.
        tokens_1T: int32 ids; those behind the first `length_1` are padding, which later tokens overwrite.

    Returns:
        The vector [1, 1, D] of the last token, and the row's cache of T positions, or of a layer's window.
    """
    decoder = CachedDecoder(model.config, model.weights, model.layout)
    x_1TD, cache = decoder.prefill(tokens_1T)
    x_11D = jax.lax.dynamic_slice_in_dim(x_1TD, length_1[0] - 1, 1, axis=1)
    return x_11D, newest_of(model.config, cache, length_1)


@jax.jit
def draw_first(
    model: SampledModel, x_11D: jax.Array, row: RowState, seen_1V: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Draws the token [1] after a prefill, given the row's state after it; returns it and `seen_1V` with it."""
    decoder = CachedDecoder(model.config, model.weights, model.layout)
    seen_1V = None if seen_1V is None else model.layout.reshard(seen_1V, "batch", None)
    token_1 = sample_next(model, decoder, x_11D, row, seen_1V)
    return token_1, mark_seen(seen_1V, token_1)


@partial(jax.jit, donate_argnums=0)
def insert_row(state: DecodeState, row: DecodeState, slot: jax.Array) -> DecodeState:
    """Returns the state with one row's state in a slot; `state` is donated."""
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_slice_in_dim(all, one, slot, axis=0), state, row)


@partial(jax.jit, donate_argnums=2)
def decode_steps(
    model: SampledModel,
    rows: RowState,
    state: DecodeState,
    eos_ids_K: jax.Array,
    max_new_tokens: jax.Array,
    capacity: jax.Array,
) -> tuple[jax.Array, DecodeState]:
    """Draws up to STEPS_PER_CALL tokens in each row, until it ends or the cache has `capacity` tokens of it.

    A row ends with one of `eos_ids_K`, or when it has drawn `max_new_tokens`. `state` is donated.

    Returns:
        Token ids [B, STEPS_PER_CALL], NO_TOKEN where a row has drawn none, and the state.
    """
    decoder = CachedDecoder(model.config, model.weights, model.layout)
    lengths_B = rows.cache_length
    is_active = lambda rows: (rows.token != NO_TOKEN) & (rows.cache_length < capacity)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, rows, recent, seen_BV, tokens_BN = carry
        active_B = is_active(rows)
        tokens_B1 = jnp.where(active_B, rows.token, 0)[:, None]
        previous_B1 = None if rows.previous is None else rows.previous[:, None]
        x_B1D, recent = decoder.step(tokens_B1, i, lengths_B, state.cache, recent, previous_B1)
        token_B = jnp.where(active_B, sample_next(model, decoder, x_B1D, rows, seen_BV), NO_TOKEN)
        num_drawn_B = rows.num_drawn + active_B
        ended_B = jnp.any(token_B[:, None] == eos_ids_K, axis=1) | (num_drawn_B >= max_new_tokens)
        next_B = jnp.where(active_B, jnp.where(ended_B, NO_TOKEN, token_B), rows.token)
        previous_B = None if rows.previous is None else rows.token
        rows = RowState(next_B, rows.cache_length + active_B, rows.prompt_index, num_drawn_B, previous_B)
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, i))
        return i + 1, rows, recent, mark_seen(seen_BV, token_B), tokens_BN

    def any_active(carry: tuple[Any, ...]) -> jax.Array:
        i, rows, *_ = carry
        return (i < STEPS_PER_CALL) & jnp.any(is_active(rows))

    tokens_BN = jnp.full((len(rows.token), STEPS_PER_CALL), NO_TOKEN, jnp.int32)
    recent = empty_cache(model.config, len(rows.token), STEPS_PER_CALL, model.layout)
    first = jnp.int32(0), rows, recent, state.seen_BV, tokens_BN
    _, _, recent, seen_BV, tokens_BN = jax.lax.while_loop(any_active, step, first)
    return tokens_BN, DecodeState(extended_cache(model.config, state.cache, recent, lengths_B), seen_BV)


def sample_next(
    model: SampledModel, decoder: CachedDecoder, x_B1D: jax.Array, rows: RowState, seen_BV: jax.Array | None
) -> jax.Array:
    """Draws each row's token after the position of x, [B], with a key from seed, prompt and tokens drawn."""
    logits_B1V = model.layout.reshard(decoder.logits(x_B1D), "batch", None, None)
    prompt_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(model.seed), rows.prompt_index)
    keys_B = jax.vmap(jax.random.fold_in)(prompt_keys_B, rows.num_drawn)
    return sample(logits_B1V[:, 0], keys_B, model.sampling, seen_BV)


def mark_seen(seen_BV: jax.Array | None, token_B: jax.Array) -> jax.Array | None:
    """Returns `seen_BV` with each row's new token; NO_TOKEN adds nothing."""
    return None if seen_BV is None else seen_BV | (jnp.arange(seen_BV.shape[1]) == token_B[:, None])
