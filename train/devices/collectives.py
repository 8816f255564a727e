"""Collectives between the processes of a run: a barrier, an all-gather and a broadcast of JSON values."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_first_process(action: Callable[[], Any]) -> None:
    """Runs an action on process 0; a barrier makes the others wait until it is done."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("once")


def all_gather_json(value: Any) -> list[Any]:
    """All-gathers JSON values; returns them by process. All processes call it together."""
    if jax.process_count() == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(everyones, sizes.tolist(), strict=True)]


def broadcast_json(make: Callable[[], Any]) -> Any:
    """Broadcasts a JSON value that process 0 makes. All processes call it together."""
    return all_gather_json(make() if jax.process_index() == 0 else None)[0]
