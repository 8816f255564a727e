"""Dropout (Srivastava et al. 2014) whose masks belong to the rows of the global batch.

Every row of a step has a key; each place where something is dropped folds its number in. So a mask depends on the seed,
the step, the row, the layer and the place alone: never on the mesh, on accumulation, or on what was trained before.
"""

import jax
import jax.numpy as jnp

# One key a row [B]; none: nothing is dropped.
DropoutKeys = jax.Array | None


def row_keys(seed: int, step: jax.Array, rows_B: jax.Array) -> jax.Array:
    """The keys [B] of these rows (their numbers in the global batch) at this step."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(seed), step), rows_B)


def fold_keys(keys_B: DropoutKeys, place: int | jax.Array) -> DropoutKeys:
    """The keys of one place or layer."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, place)


def dropout(x: jax.Array, rate: float, keys_B: DropoutKeys) -> jax.Array:
    """x [B, ...] with each component zero at probability `rate`, the others larger by 1/(1 - rate)."""
    if keys_B is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.empty:
        kept = jax.reshard(kept, sharding.spec)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
