"""The reward of a sampled answer by a reward model (`model.reward_head`), on the mesh of the run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.errors import InputError
from data.tokenizer.tokenizer import Tokenizer
from train.config.config import ResolvedConfig
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options
from train.evaluation.held_out import put_on_devices, stack_rows
from train.step.objective import scores
from train.weights.load import load_trained, open_weights


class RewardModel:
    """A reward model, whose weights are loaded when it is first called.

    Args:
        where: its RUN, RUN@STEP or exported WEIGHTS.
        config: the run's own settings.
        alive: is called after what takes long.

    Raises:
        InputError: there is none, it is no reward model, or it has another tokenizer than the run.
    """

    def __init__(self, where: str, config: ResolvedConfig, tokenizer: Tokenizer, alive: Callable[[], None]):
        self._where, self._config, self._alive = where, config, alive
        self._loaded: tuple[Callable[..., jax.Array], Any] | None = None
        opened = open_weights(where)
        named = f"objective.reward = {where}"
        if not opened.config.reward_head:
            raise InputError(f"{named} predicts tokens and gives no scores; name a run with model.reward_head")
        if opened.tokenizer.pieces != tokenizer.pieces:
            raise InputError(f"{named} has another tokenizer than the run; name one that began from the same model")
        if (most := opened.config.max_positions) and most < config.data.segment_length:
            raise InputError(
                f"{named} has {most} positions, fewer than data.segment_length = {config.data.segment_length}; lower it"
            )

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the score at the last token of each sequence, float64. All processes call it together."""
        if self._loaded is None:
            trained = load_trained(self._where, predicts=False)
            self._loaded = (
                jax.jit(partial(scores, trained.config), compiler_options=compiler_options()),
                trained.weights,
            )
        score, weights = self._loaded
        c = self._config
        # A whole number of segments, so that a mesh which shares those shares these.
        T = c.data.segment_length * -(-max(map(len, sequences)) // c.data.segment_length)
        size = c.train.batch_size // c.train.accumulation_steps
        found = []
        for batch in stack_rows((row_of(tokens, T) for tokens in sequences), size):
            on_devices = put_on_devices(batch, batch_sharding(jax.sharding.get_mesh(), training_layout(c.mesh)))
            score_BT = multihost_utils.process_allgather(score(weights, on_devices), tiled=True)
            found.append(np.asarray(score_BT, np.float64)[:, 0])
            self._alive()
        return np.concatenate(found)[: len(sequences)]


def row_of(tokens: Sequence[int], T: int) -> dict[str, np.ndarray]:
    """Returns the row [T] of one sequence, as `scores` reads it."""
    row = {name: np.zeros(T, np.int32) for name in ("tokens", "positions", "segment_ids")}
    n = len(tokens)
    row["tokens"][:n], row["positions"][:n], row["segment_ids"][:n] = tokens, np.arange(n), 1
    return row
