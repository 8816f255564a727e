"""Generation: the model continues prompts by continuous batching.

A prompt is prefilled alone, padded to the next power of two; neighbours that are the same are prefilled once. Then all
rows of the batch decode together, a few tokens in each call of one compiled loop. A row has its own positions, its own
part of the cache and its own random keys, so its tokens do not depend on the other rows; when it has ended, its slot is
given to the next prompt.
"""

import dataclasses
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.backend import platform
from model.config import ResolvedModelConfig
from model.generation.decoder import empty_cache
from model.generation.programs import (
    NO_TOKEN,
    STEPS_PER_CALL,
    DecodeState,
    RowState,
    SampledModel,
    decode_steps,
    draw_first,
    insert_row,
    prefill,
)
from model.generation.sampling import Sampling
from model.generation.weights import decoding_weights
from model.sharding import UNSHARDED, Layout


class TokenDelta(NamedTuple):
    """The tokens that a continuation has gained since its last delta, without EOS.

    Attributes:
        ended: "eos" or "length" (the limit) in a prompt's last delta.
        end_id: the token that was drawn as EOS.
    """

    prompt_index: int
    tokens: list[int]
    ended: str | None = None
    end_id: int | None = None


@dataclass
class Request:
    """A prompt and its continuation, as the host keeps them.

    Attributes:
        tokens: token ids of prompt and continuation, of which the last `num_drawn` were drawn.
        window: the newest of `tokens`, which the model sees; the cache may not hold the last yet.
        cache_length: number of tokens of the window that the cache holds.
    """

    prompt_index: int
    tokens: list[int]
    window: list[int]
    cache_length: int = 0
    num_drawn: int = 0


class Generator:
    """A model prepared to continue prompts.

    Args:
        weights: the nested dictionary of weights, which is copied (see `decoding_weights`).
        context: the number of positions that the model sees at most.
        int8: products are of whole numbers (`model.cpu.int8_product`); on one CPU alone.
    """

    def __init__(
        self,
        config: ResolvedModelConfig,
        weights: Any,
        *,
        context: int,
        eos_id: int | Sequence[int],
        layout: Layout = UNSHARDED,
        int8: bool = False,
    ):
        num_devices = jax.sharding.get_abstract_mesh().size
        assert not int8 or (platform() == "cpu" and num_devices <= 1)
        # A kernel that was asked for in training may not take the lengths of prompts.
        self.config = dataclasses.replace(config, attention_kernel="auto")
        # On one device nothing is sharded, and reshapes need no rules for sharded axes.
        self.layout = layout if num_devices > 1 else UNSHARDED
        self.weights = decoding_weights(config, weights, int8)
        self.context = context
        self.eos_ids = np.atleast_1d(np.array(eos_id, np.int32))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        batch_size: int = 1,
        stopped: Collection[int] = (),
    ) -> Iterator[TokenDelta]:
        """Continues prompts; yields tokens as they are drawn, those of a prompt in order.

        The model sees at most `context` positions. When these are full, the newer half is prefilled again from position
        0, so that the model always sees a segment as in training. Of a prompt that is longer than the context, it sees
        the newest part. The same seed and prompt index give the same tokens.

        Args:
            prompts: token ids of each prompt, at least one.
            batch_size: the most prompts that are continued at once.
            stopped: indices of prompts that need no more tokens; the caller may add to it after each delta.
        """
        requests = [Request(i, [*prompt], [*prompt][-self.context :]) for i, prompt in enumerate(prompts)]
        if not requests or not max_new_tokens:
            yield from (TokenDelta(request.prompt_index, [], "length") for request in requests)
            return
        yield from Scheduler(self, deque(requests), max_new_tokens, sampling, seed, batch_size, stopped).run()


@dataclass
class Scheduler:
    """Continuous batching: the slots of one batch, and the requests that wait for one.

    The fields are the arguments of `Generator.__call__`.
    """

    generator: Generator
    waiting: deque[Request]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    batch_size: int
    stopped: Collection[int]

    def __post_init__(self) -> None:
        self.slots: list[Request | None] = [None] * next_power_of_two(min(self.batch_size, len(self.waiting)))
        longest = max(len(request.window) for request in self.waiting)
        needed = max(next_power_of_two(longest), round_up(longest + self.max_new_tokens))
        self.capacity = min(needed, self.generator.context)
        config, layout = self.generator.config, self.generator.layout
        if config.rope_scaling == "longrope":
            # All tokens of a request are rotated alike, from its first to its last.
            longest_row = self.capacity > (config.rope_original_context or 0)
            config = dataclasses.replace(config, rope_long=longest_row)
        cache = empty_cache(config, len(self.slots), self.capacity + STEPS_PER_CALL, layout)
        self.state = DecodeState(cache, self._seen_tokens(self.slots))
        # The tokens that were prefilled last.
        self._prefilled: list[int] = []
        self.model = SampledModel(config, layout, self.sampling, self.generator.weights, np.int32(self.seed))

    def run(self) -> Iterator[TokenDelta]:
        """Yields the tokens of all requests until the last has ended."""
        eos_id, limit, capacity = self.generator.eos_ids, np.int32(self.max_new_tokens), np.int32(self.capacity)
        while True:
            yield from self.admit()
            if not any(self.slots):
                return
            tokens_BN, self.state = decode_steps(
                self.model, self._row_state(self.slots), self.state, eos_id, limit, capacity
            )
            yield from self.collect(np.asarray(tokens_BN))

    def admit(self) -> Iterator[TokenDelta]:
        """Prefills free slots with waiting requests, and full ones with the newer half of their context."""
        for slot in range(len(self.slots)):
            while request := self._to_prefill(slot):
                self.slots[slot] = request
                yield from self._deliver(slot, self._prefill(request, slot))

    def collect(self, tokens_BN: np.ndarray) -> Iterator[TokenDelta]:
        """Yields the tokens [B, N] of decode steps, and frees the slots of requests that have ended."""
        for slot, tokens_N in enumerate(tokens_BN):
            request, tokens = self.slots[slot], tokens_N[tokens_N != NO_TOKEN].tolist()
            if request and tokens:
                request.cache_length += len(tokens)
                yield from self._deliver(slot, tokens)

    def _to_prefill(self, slot: int) -> Request | None:
        request = self.slots[slot]
        if request is None:
            return self.waiting.popleft() if self.waiting else None
        if request.cache_length < self.capacity:
            return None
        request.window = request.window[-max(self.generator.context // 2, 1) :]
        return request

    def _prefill(self, request: Request, slot: int) -> list[int]:
        length = request.cache_length = len(request.window)
        row = self._row_state([request])
        # The next request often continues the same prompt.
        if request.window != self._prefilled:
            T = min(next_power_of_two(length), self.generator.context)
            tokens_1T = np.array([request.window + [0] * (T - length)], np.int32)
            self._x_11D, self._cache = prefill(self.model, row.cache_length, tokens_1T)
            self._prefilled = [*request.window]
        token_1, seen_1V = draw_first(self.model, self._x_11D, row, self._seen_tokens([request]))
        self.state = insert_row(self.state, DecodeState(self._cache, seen_1V), slot)
        return np.asarray(token_1).tolist()

    def _deliver(self, slot: int, tokens: list[int]) -> Iterator[TokenDelta]:
        request = self.slots[slot]
        assert request is not None
        request.tokens += tokens
        request.window += tokens
        request.num_drawn += len(tokens)
        ended, end_id = "length" if request.num_drawn == self.max_new_tokens else None, None
        if tokens[-1] in self.generator.eos_ids:
            *tokens, end_id = tokens
            ended = "eos"
        yield TokenDelta(request.prompt_index, tokens, ended, end_id)
        if ended or request.prompt_index in self.stopped:
            self.slots[slot] = None

    def _row_state(self, requests: Sequence[Request | None]) -> RowState:
        empty = RowState(NO_TOKEN, 0, 0, 0)
        rows = [RowState(r.window[-1], r.cache_length, r.prompt_index, r.num_drawn) if r else empty for r in requests]
        state = RowState(*np.array([row[:4] for row in rows], np.int32).T)
        if not self.generator.config.smear:
            return state
        # A window of one token is only prefilled, which needs none before.
        return state._replace(previous=np.array([r.window[-2:][0] if r else 0 for r in requests], np.int32))

    def _seen_tokens(self, requests: Sequence[Request | None]) -> jax.Array | None:
        if not self.sampling.penalizes:
            return None
        seen_BV = np.zeros((len(requests), len(self.generator.weights["embedding"]["table"])), bool)
        for row, request in enumerate(requests):
            seen_BV[row, request.tokens if request else []] = True
        return jnp.asarray(seen_BV)


def round_up(n: int) -> int:
    """Rounds a cache length up to three binary digits and zeros, at most a quarter more, to compile few programs."""
    unit = 1 << max((n - 1).bit_length() - 3, 0)
    return -(-n // unit) * unit


def next_power_of_two(n: int) -> int:
    """Returns the smallest power of two that is not less than n."""
    return 1 << (n - 1).bit_length()
