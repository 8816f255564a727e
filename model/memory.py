"""Results that go to memory before a product takes them, in the order of their axes.

Else the TPU compiler computes them again for each tile of the product, or computes their use tile by tile behind the
product, which then takes up to twice as long. With a single row a device it also keeps some arrays with positions last,
and copies from one order to the other.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from model.backend import platform


@jax.custom_vjp
def in_order(x: jax.Array) -> jax.Array:
    """Returns x; a TPU holds it, and its gradient, in the order of its axes.

    Not with JAX before 0.12, whose partitioner would gather the whole array to do so.
    """
    if platform() != "tpu" or jax.__version_info__ < (0, 12):
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


@jax.custom_vjp
def result_in_memory(x: jax.Array) -> jax.Array:
    """Returns x, which is not computed inside the operation that takes it."""
    return in_order(jax.lax.optimization_barrier(x))


@jax.custom_vjp
def gradient_in_memory(x: jax.Array) -> jax.Array:
    """Returns x, whose gradient is not computed inside another operation."""
    return in_order(x)


in_order.defvjp(lambda x: (in_order(x), None), lambda _, slope: (in_order(slope),))
result_in_memory.defvjp(lambda x: (result_in_memory(x), None), lambda _, slope: (in_order(slope),))
gradient_in_memory.defvjp(
    lambda x: (gradient_in_memory(x), None), lambda _, slope: (in_order(jax.lax.optimization_barrier(slope)),)
)
