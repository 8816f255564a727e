"""Products of rows, sorted by expert, with the matrices of their experts."""

import jax
import jax.numpy as jnp


def grouped_product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns each row's product with its expert's matrix; rows behind the sum of the sizes are undefined."""
    return jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, preferred_element_type=jnp.float32).astype(x_MK.dtype)
