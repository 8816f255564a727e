"""Dropout (Srivastava et al. 2014) with a mask for each row of the global batch.

Every row of a step has a key, into which each layer and each place of dropout folds its number. So a mask depends only
on the seed, the step, the row, the layer and the place: not on the mesh, gradient accumulation or earlier training.
"""

import jax
import jax.numpy as jnp

# One key a row [B], or None where nothing is dropped.
DropoutKeys = jax.Array | None


def row_keys(seed: int, step: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Returns the keys [B] of rows at a step; `rows_B` are their numbers in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(seed), step), rows_B)


def fold_keys(keys_B: DropoutKeys, number: int | jax.Array) -> DropoutKeys:
    """Returns the rows' keys for the layer or place with this number."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: jax.Array, rate: float, keys_B: DropoutKeys) -> jax.Array:
    """Returns x [B, ...] with components set to zero at probability `rate` and the others scaled by 1/(1 - rate)."""
    if keys_B is None or rate == 0:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    sharding = jax.typeof(x).sharding
    if not sharding.mesh.empty:
        kept = jax.reshard(kept, sharding.spec)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
