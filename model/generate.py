"""Generation: the model continues prompts, with a cache of earlier keys and values.

A prompt is read at once, at a length that is the next power of two. Then all rows go on together, a few tokens in each
call of one compiled loop. A row has its own positions, its own part of the cache and its own random keys, so what it
gives does not depend on the rows beside it; one that has ended makes room for the next prompt.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.attention import Cache
from model.config import ModelConfig
from model.decoder import Decoder
from model.parameters import flattened, nested, parameter_table
from model.sampling import Sampling, draw
from model.sharding import WHOLE, Layout

# Tokens that a row draws in one call.
PIECE = 8
# Of a row that does not go on.
NONE = -1


class Piece(NamedTuple):
    """What a row has drawn since its last piece.

    Attributes:
        number: of its prompt, from 0.
        tokens: new ones, EOS not among them.
        ended: "eos" or "length" (the limit) where this is its last piece.
    """

    number: int
    tokens: list[int]
    ended: str | None = None


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


@partial(jax.jit, static_argnums=0)
def prepared(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights as they are read again for each token: a copy in the compute dtype, for `Layout.inputs_last`.

    Each layer has its own arrays ("blocks" is a list), so that none is cut out of a stack each time, and of each matrix
    the axes that are summed over come last: see `model.product.turned_product`.
    """
    table = parameter_table(config)

    def prepare(name: str, array: jax.Array, *stacked: str) -> jax.Array:
        parameter = table[name]
        if parameter.role in ("matrix", "unembedding"):
            axes = [axis for axis in parameter.axes if axis not in stacked]
            array = jnp.transpose(array, sorted(range(len(axes)), key=lambda i: axes[i] in parameter.fan_in))
        return array if parameter.role == "norm" else array.astype(config.compute_dtype)

    def layer(number: int) -> dict[str, Any]:
        flat = flattened(weights["blocks"])
        return nested({name: prepare(f"blocks.{name}", array[number], "layers") for name, array in flat.items()})

    others = flattened({name: branch for name, branch in weights.items() if name != "blocks"})
    found = nested({name: prepare(name, array) for name, array in others.items()})
    return found | {"blocks": [layer(number) for number in range(config.num_layers)]}


def empty_cache(config: ModelConfig, batch: int, context: int, layout: Layout = WHOLE) -> list[Cache]:
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


@dataclass
class Row:
    """A prompt and its continuation, as the host keeps it.

    Attributes:
        number: of the prompt.
        had: all tokens.
        seen: those of them that the model sees, the last of which it may not have read yet.
        read: how many of those the cache holds.
        drawn: how many of `had` are drawn.
    """

    number: int
    had: list[int]
    seen: list[int]
    read: int = 0
    drawn: int = 0

    def take(self, tokens: list[int]) -> None:
        """Add what was drawn."""
        self.had += tokens
        self.seen += tokens
        self.drawn += len(tokens)


class Generator:
    """A model made ready to continue prompts.

    Args:
        config: of the model.
        weights: the nested dictionary; it is copied (see `prepared`).
        context: the positions that the model sees at most.
        eos_id: of the token that ends a text.
        layout: of weights and cache.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Any], *, context: int, eos_id: int, layout: Layout = WHOLE
    ):
        # A prompt's length is not the training's, for which a kernel may have been asked for.
        self.config = dataclasses.replace(config, attention_kernel="auto")
        self.layout = dataclasses.replace(layout, inputs_last=True)
        self.weights = prepared(config, weights)
        self.context, self.eos_id = context, eos_id

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        batch_size: int = 1,
        stopped: Collection[int] = (),
    ) -> Iterator[Piece]:
        """Continue prompts; yields pieces as they are drawn, those of a prompt in order.

        The model sees at most `context` positions. When they are full a row goes on from the newer half of them, read
        anew from position 0 (so what the model sees is always a segment as in training). Of a prompt longer than the
        context the newest part is seen. The same seed and number give the same tokens.

        Args:
            prompts: token ids of each, at least one.
            max_new_tokens: the limit of each.
            sampling: how tokens are drawn.
            seed: of the random keys.
            batch_size: how many prompts are continued at once, at most.
            stopped: numbers of prompts of which no more is wanted; the caller may add to it after each piece.
        """
        waiting = deque(Row(i, [*prompt], [*prompt][-self.context :]) for i, prompt in enumerate(prompts))
        if not waiting or not max_new_tokens:
            yield from (Piece(row.number, [], "length") for row in waiting)
            return
        rows: list[Row | None] = [None] * power_of_two(min(batch_size, len(waiting)))
        longest = max(len(row.seen) for row in waiting)
        capacity = min(max(power_of_two(longest), rounded(longest + max_new_tokens)), self.context)
        state = State(
            empty_cache(self.config, len(rows), capacity, self.layout),
            self._none_had(len(rows)) if sampling.penalizes else None,
        )
        eos_and_limit = np.array([self.eos_id, max_new_tokens], np.int32)
        of_all = Program(self.config, self.layout, sampling), self.weights, np.int32(seed)

        def taken(row: Row, tokens: list[int]) -> Piece:
            row.take(tokens)
            if row.had[-1] == self.eos_id:
                return Piece(row.number, tokens[:-1], "eos")
            return Piece(row.number, tokens, "length" if row.drawn == max_new_tokens else None)

        while True:
            for slot in range(len(rows)):
                row = rows[slot]
                while row is None or row.read in (0, capacity):
                    if row is None:
                        if not waiting:
                            break
                        row = waiting.popleft()
                    elif row.read:
                        row.seen = row.seen[-max(self.context // 2, 1) :]
                    row.read = len(row.seen)
                    T = min(power_of_two(row.read), self.context)
                    tokens_1T = np.array([row.seen + [0] * (T - row.read)], np.int32)
                    had_1V = self._had(row.had) if sampling.penalizes else None
                    token_1, of_row = read(*of_all, self._places([row]), tokens_1T, had_1V)
                    state = put(state, of_row, slot)
                    piece = taken(row, np.asarray(token_1).tolist())
                    yield piece
                    if piece.ended or row.number in stopped:
                        row = None
                rows[slot] = row
            if not any(rows):
                return
            tokens_BN, state = go_on(*of_all, self._places(rows), state, eos_and_limit)
            for slot, drawn_N in enumerate(np.asarray(tokens_BN)):
                row, tokens = rows[slot], drawn_N[drawn_N != NONE].tolist()
                if row is None or not tokens:
                    continue
                row.read += len(tokens)
                piece = taken(row, tokens)
                yield piece
                if piece.ended or row.number in stopped:
                    rows[slot] = None

    def _places(self, rows: Sequence[Row | None]) -> Place:
        columns = [(row.seen[-1], row.read, row.number, row.drawn) if row else (NONE, 0, 0, 0) for row in rows]
        return Place(*np.array(columns, np.int32).T)

    def _none_had(self, batch: int) -> jax.Array:
        V = len(self.weights["embedding"]["table"])
        return jnp.zeros((batch, V), bool, out_sharding=self.layout.sharding("batch", None))

    def _had(self, tokens: Sequence[int]) -> np.ndarray:
        had_1V = np.zeros((1, len(self.weights["embedding"]["table"])), bool)
        had_1V[0, list(tokens)] = True
        return had_1V


def rounded(n: int) -> int:
    """The next number of three binary digits and zeros: a quarter more than n at most."""
    unit = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // unit) * unit


def power_of_two(n: int) -> int:
    """The next one, n itself included: what has it as its size shares few compiled programs."""
    return 1 << (n - 1).bit_length()
