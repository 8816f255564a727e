"""Generation: the model continues prompts, with a cache of earlier keys and values.

A prompt is read at once, at a length that is the next power of two. Then all rows go on together, a few tokens in each
call of one compiled loop. A row has its own positions, its own part of the cache and its own random keys, so what it
gives does not depend on the rows beside it; one that has ended makes room for the next prompt.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.generation.programs import NONE, Place, Program, State, empty_cache, go_on, put, read
from model.generation.sampling import Sampling
from model.generation.weights import prepared
from model.sharding import UNSHARDED, Layout


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
        self, config: ModelConfig, weights: Mapping[str, Any], *, context: int, eos_id: int, layout: Layout = UNSHARDED
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
