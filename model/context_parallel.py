"""The order of positions under context parallelism, which gives every device the same causal work.

Where n devices share the time, a row is cut into 2n pieces, and device i takes the i-th piece from either end (Llama
Team 2024, section 3.3.2): often called zigzag order.
"""

import jax
import jax.numpy as jnp
import numpy as np

from model.sharding import Layout, as_tuple


def zigzag_order(T: int, layout: Layout) -> np.ndarray:
    """Returns the positions of a row [T] in the order in which the devices hold them, int32."""
    n = layout.size("time")
    if n == 1:
        return np.arange(T, dtype=np.int32)
    pieces = np.arange(T, dtype=np.int32).reshape(2 * n, -1)
    return np.stack([pieces[:n], pieces[n:][::-1]], axis=1).reshape(T)


def to_zigzag(x_BT: jax.Array, layout: Layout) -> jax.Array:
    """Returns an array of a batch [B, T] in `zigzag_order`, sharded over the time."""
    if not layout.mesh_axes("time"):
        return x_BT
    whole = layout.reshard(x_BT, "batch", None)
    return layout.reshard(whole[:, zigzag_order(x_BT.shape[1], layout)], "batch", "time")


def from_zigzag(x_BT: jax.Array, layout: Layout) -> jax.Array:
    """Returns an array [B, T] in the order of the rows, which was in `zigzag_order`."""
    if not layout.mesh_axes("time"):
        return x_BT
    whole = layout.reshard(x_BT, "batch", None)
    return layout.reshard(whole[:, np.argsort(zigzag_order(x_BT.shape[1], layout))], "batch", "time")


def previous_tokens(tokens_BT: jax.Array, segment_ids_BT: jax.Array, layout: Layout) -> jax.Array:
    """Returns the id of the token before each position in its document, int32 [B, T]; -1 where there is none.

    All arrays are in `zigzag_order`. Ids of all positions are gathered, because that before one may be elsewhere.
    """
    order_T = zigzag_order(tokens_BT.shape[1], layout)
    # The place of the position before; of the first position, that of the last.
    before_T = np.argsort(order_T)[order_T - 1]
    tokens_BT, ids_BT = (layout.reshard(x_BT, "batch", None) for x_BT in (tokens_BT, segment_ids_BT))
    is_inside_BT = (ids_BT[:, before_T] == ids_BT) & (order_T > 0)
    return layout.reshard(jnp.where(is_inside_BT, tokens_BT[:, before_T], -1), "batch", "time")


def all_positions(x: jax.Array, layout: Layout, axis: int) -> jax.Array:
    """All-gathers the positions at an axis, inside `jax.shard_map`, and returns them in the order of the row."""
    n = layout.size("time")
    if n == 1:
        return x
    x = jax.lax.all_gather(x, as_tuple(layout.rules["time"]), axis=axis, tiled=True)
    pieces = jnp.split(x, 2 * n, axis)
    return jnp.concatenate([*pieces[::2], *pieces[1::2][::-1]], axis)
