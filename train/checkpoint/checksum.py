"""Checksums of arrays that do not depend on the mesh."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Words that are summed up at once.
WORDS_PER_BLOCK = 2**18
ODD_FACTOR = 2654435761


def partial_checksum(part: np.ndarray, start: int) -> int:
    """What consecutive elements add to the checksum of their array (see `train.checkpoint.checksum.checksums`).

    Args:
        part: the elements, in C order.
        start: the place of the first in its array.
    """
    words = np.ascontiguousarray(part).reshape(-1).view({4: np.uint32, 2: np.uint16, 1: np.uint8}[part.dtype.itemsize])
    places, total = np.arange(min(WORDS_PER_BLOCK, words.size), dtype=np.uint32), 0
    for first in range(0, words.size, WORDS_PER_BLOCK):
        block = words[first : first + WORDS_PER_BLOCK].astype(np.uint32, copy=False)
        # Both sums are modulo 2³², as the whole is.
        by_place = int(np.dot(places[: block.size], block))
        total += 2 * by_place + (2 * (start + first) + 1) * int(block.sum(dtype=np.uint32))
    return total * ODD_FACTOR % 2**32


# In a checkpoint's progress.
DIGEST_KEY = "digest"


@jax.jit
def checksums(tree: Any) -> Any:
    """A uint32 for each array: its bits, each word weighed by its place, summed modulo 2³².

    Integer sums do not depend on their order, so any mesh gives the same number. Any single flipped bit changes it.
    """

    def of_array(x: jax.Array) -> jax.Array:
        words = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        place, total = jnp.uint32(1), jnp.zeros((), jnp.uint32)
        for axis, size in enumerate(x.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = (place * jnp.uint32(size) + index) if axis else index
        # The weight of a place is odd, so multiplying by it loses no bit.
        weight = (2 * place + 1) * jnp.uint32(2654435761)
        return total + jnp.sum(bits * weight, dtype=jnp.uint32)

    return jax.tree.map(of_array, tree)


def progress_digest(progress: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of all else in a checkpoint's progress."""
    rest = json.loads(json.dumps({name: value for name, value in progress.items() if name != DIGEST_KEY}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_progress_digest(progress: Mapping[str, Any]) -> None:
    """ValueError where a checkpoint's progress is not what was saved. Those of version 0.5 have no digest."""
    if progress.get(DIGEST_KEY, progress_digest(progress)) != progress_digest(progress):
        raise ValueError("its progress is not what was saved")
