"""The product of activations with a weight, accumulated in float32 forward and backward.

Left to themselves, XLA's CPU products of bfloat16 accumulate in bfloat16, at half the speed, and the gradient of a
weight transposes the wider of its two operands. Here the backward pass names its products as the forward pass does, and
puts the narrower operand first. Gradients are rounded to the compute dtype, so reductions between devices move no more
bytes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def product(
    equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None, dtype: Any = None
) -> jax.Array:
    """`jnp.einsum(equation, x, weight)`, summed in float32.

    Args:
        equation: such as "btd,df->btf"; each letter stands in two of its three terms, or in all.
        x: activations.
        weight: or other activations, in the same dtype.
        out_sharding: of the result, where it does not follow from the operands.
        dtype: of the result; by default that of `x`.
    """
    return einsum(equation, x, weight, out_sharding).astype(dtype or x.dtype)


def einsum(equation: str, x: jax.Array, y: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def _forward(equation, x, weight, out_sharding, dtype):  # type: ignore[no-untyped-def]
    return product(equation, x, weight, out_sharding, dtype), (x, weight)


def _backward(equation, out_sharding, dtype, kept, gradient):  # type: ignore[no-untyped-def]
    x, weight = kept
    gradient = gradient.astype(x.dtype)
    of_operands, of_result = equation.split("->")
    of_x, of_weight = of_operands.split(",")
    to_x = einsum(f"{of_result},{of_weight}->{of_x}", gradient, weight, _gradient_sharding(x))
    (first, of_first), (second, of_second) = sorted(((x, of_x), (gradient, of_result)), key=lambda pair: pair[0].size)
    to_weight = einsum(f"{of_first},{of_second}->{of_weight}", first, second, _gradient_sharding(weight))
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype)


def _gradient_sharding(x: jax.Array) -> PartitionSpec | None:
    """The partition of an array's gradient: where the one is `reduced`, the other is still to be summed."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return None
    return PartitionSpec(*sharding.spec.partitions, unreduced=sharding.spec.reduced, reduced=sharding.spec.unreduced)


product.defvjp(_forward, _backward)


@jax.custom_vjp
def weight_gradients_first(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
    """The same; but the backward pass goes on from the gradient of x only when those of the weights are there.

    Else the compiler may put off products for weights, and keep what they are made of, or their unscattered sums, while
    it computes the gradients of earlier layers.
    """
    return x, weights


weight_gradients_first.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))
