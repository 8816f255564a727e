"""Checksums of arrays, and a digest of all else that a checkpoint holds.

The checksum of an array with the words w₀, w₁, … (its elements' bits as unsigned integers, in C order) is

    Σᵢ (2i + 1) · wᵢ · 2654435761  (mod 2³²).

The one word of an array without axes counts as w₁. A sum of integers does not depend on its order, so every mesh gives
the same number. The factors are odd, so any single flipped bit changes it. `checksums` computes it on devices,
`partial_checksum` in NumPy for an array read in parts.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ODD_FACTOR = 2654435761
# The words that NumPy sums up at once.
WORDS_PER_BLOCK = 2**18
# The key of the digest in a checkpoint's progress.
DIGEST_KEY = "digest"


@jax.jit
def checksums(tree: Any) -> Any:
    """Returns the checksum of each array of a tree, a uint32."""

    def checksum(x: jax.Array) -> jax.Array:
        words = {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        place = jnp.uint32(1)
        for axis, size in enumerate(x.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            place = (place * jnp.uint32(size) + index) if axis else index
        return jnp.sum(bits * ((2 * place + 1) * jnp.uint32(ODD_FACTOR)), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


def partial_checksum(part: np.ndarray, start: int) -> int:
    """Returns the summand, modulo 2³², of consecutive elements of an array, in C order from the index `start` on."""
    words = np.ascontiguousarray(part).reshape(-1).view({4: np.uint32, 2: np.uint16, 1: np.uint8}[part.dtype.itemsize])
    places = np.arange(min(WORDS_PER_BLOCK, words.size), dtype=np.uint32)
    total = 0
    for first in range(0, words.size, WORDS_PER_BLOCK):
        block = words[first : first + WORDS_PER_BLOCK].astype(np.uint32, copy=False)
        # Both sums are modulo 2³², as the total is.
        by_place = int(np.dot(places[: block.size], block))
        total += 2 * by_place + (2 * (start + first) + 1) * int(block.sum(dtype=np.uint32))
    return total * ODD_FACTOR % 2**32


def progress_digest(progress: Mapping[str, Any]) -> str:
    """Returns the SHA-256 (hex) of a checkpoint's progress without its digest."""
    values = json.loads(json.dumps({name: value for name, value in progress.items() if name != DIGEST_KEY}))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_progress_digest(progress: Mapping[str, Any]) -> None:
    """Raises ValueError if a checkpoint's progress is not what was saved. Version 0.5 saved no digest."""
    if progress.get(DIGEST_KEY, progress_digest(progress)) != progress_digest(progress):
        raise ValueError("its progress is not what was saved")
