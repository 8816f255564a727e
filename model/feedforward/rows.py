"""Rows of tokens on their way to experts and back, moved by gathers whose gradients are no scatters where that can be.

Axes: N tokens, k choices of a token, M = N·k choices, R rows of a block.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def spread(x_ND: jax.Array, tokens_M: jax.Array, rows_kN: jax.Array) -> jax.Array:
    """Returns the row of each choice's token; the backward pass is `summed`, where it would scatter."""
    return x_ND[tokens_M]


@jax.custom_vjp
def summed(y_MD: jax.Array, tokens_M: jax.Array, rows_kN: jax.Array) -> jax.Array:
    """Returns the sum of each token's rows, [N, D]; the backward pass is `spread`.

    The rows of all first choices come first, and so on, so that TPUs add whole arrays.
    """
    y_kND = y_MD[rows_kN.reshape(-1)].reshape(*rows_kN.shape, -1)
    total: jax.Array = sum(y_ND.astype(jnp.float32) for y_ND in y_kND)  # type: ignore[assignment]
    return total.astype(y_MD.dtype)


spread.defvjp(
    lambda x, tokens, rows: (spread(x, tokens, rows), (tokens, rows)),
    lambda kept, dy_MD: (summed(dy_MD, *kept), None, None),
)
summed.defvjp(
    lambda y, tokens, rows: (summed(y, tokens, rows), (tokens, rows)),
    lambda kept, dy_ND: (spread(dy_ND, *kept), None, None),
)


@jax.custom_vjp
def permuted(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns rows in another order; the backward pass gathers by the inverse."""
    return y[order]


permuted.defvjp(lambda y, order, inverse: (y[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


@jax.custom_vjp
def taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """Returns rows of x in float32, as their gradients are summed; an index behind the end takes any row."""
    return x[jnp.minimum(index, len(x) - 1)].astype(jnp.float32)


def _taken_backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, None]:
    index, x = kept
    zeros = jnp.zeros(x.shape, jnp.float32)
    return zeros.at[index].add(dy, mode="drop").astype(x.dtype), None


taken.defvjp(lambda x, index: (taken(x, index), (index, x)), _taken_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def added(N: int, dtype: Any, y_RD: jax.Array, token_R: jax.Array) -> jax.Array:
    """Returns the sums of each token's rows, float32 [N, D]; rows of token N are dropped, and have any gradient.

    Args:
        dtype: the dtype of the gradient, which is gathered in it, as it moves fewer bytes.
    """
    return jnp.zeros((N, y_RD.shape[1]), jnp.float32).at[token_R].add(y_RD, mode="drop")


added.defvjp(
    lambda N, dtype, y, token: (added(N, dtype, y, token), token),
    lambda N, dtype, token, dy: (dy.astype(dtype)[jnp.minimum(token, N - 1)].astype(jnp.float32), None),
)
