"""The product of activations with a weight, accumulated in float32 forward and backward.

By default XLA's CPU products of bfloat16 accumulate in bfloat16, at half the speed. Here the backward pass states its
products as the forward pass does. Gradients are rounded to the compute dtype, so that reductions move no more bytes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.backend import on_one_cpu


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def product(
    equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None, dtype: Any = None
) -> jax.Array:
    """Returns `jnp.einsum(equation, x, weight)`, summed in float32.

    Args:
        equation: an einsum such as "btd,df->btf"; each letter is in two of its three terms, or in all.
        weight: a weight or other activations, in the dtype of x.
        out_sharding: the result's sharding, where it does not follow from the operands.
        dtype: the result's dtype; by default that of `x`.
    """
    return einsum(equation, x, weight, out_sharding).astype(dtype or x.dtype)


def einsum(equation: str, x: jax.Array, y: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    """Returns `jnp.einsum` of two arrays, summed and returned in float32."""
    if on_one_cpu():
        return _einsum_on_cpu(equation, x, y, out_sharding)
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def _einsum_on_cpu(equation: str, x: jax.Array, y: jax.Array, out_sharding: PartitionSpec | None) -> jax.Array:
    """Returns the product in the form for which XLA's CPU compiler copies the least.

    Its kernels want the summed axes of the left operand last, and a copy that changes the last axis is slow. Where no
    operand has them last (the gradient of a weight), the left one is the narrower, even if the result must then be
    transposed. `jnp.einsum` would choose by the order of the result alone.
    """
    x_letters, y_letters, z_letters = equation.replace("->", ",").split(",")
    batch = "".join(letter for letter in z_letters if letter in x_letters and letter in y_letters)
    summed = "".join(letter for letter in x_letters if letter in y_letters and letter not in z_letters)

    def own(letters: str) -> str:
        return "".join(letter for letter in letters if letter not in batch + summed)

    def preference(operand: tuple[jax.Array, str]) -> tuple[bool, float]:
        array, letters = operand
        leads = own(letters)[:1] == own(z_letters)[:1]
        is_last = letters[-1] in summed
        return not is_last, not leads if is_last else array.size * (1 if leads else 2)

    def placed(array: jax.Array, letters: str, order: str) -> jax.Array:
        return array if letters == order else jnp.transpose(array, [letters.index(letter) for letter in order])

    (left, left_letters), (right, right_letters) = sorted(((x, x_letters), (y, y_letters)), key=preference)
    left = placed(left, left_letters, batch + own(left_letters) + summed)
    order = batch + own(right_letters) + summed
    if right_letters != order:
        order = batch + summed + own(right_letters)
    right = placed(right, right_letters, order)
    contracted = range(left.ndim - len(summed), left.ndim), [order.index(letter) for letter in summed]
    both = range(len(batch))
    order = batch + own(left_letters) + own(right_letters)
    out_sharding = out_sharding and permuted(out_sharding, z_letters, order)
    z = jax.lax.dot_general(
        left, right, (contracted, (both, both)), preferred_element_type=jnp.float32, out_sharding=out_sharding
    )
    # Without the barrier XLA exchanges the operands, which spares it the transposition of the result.
    return z if order == z_letters else placed(jax.lax.optimization_barrier(z), order, z_letters)


def permuted(spec: PartitionSpec, letters: str, order: str) -> PartitionSpec:
    """Returns the spec of an array with these letters after its axes are put in another order."""
    partitions = dict(zip(letters, spec.partitions, strict=True))
    return spec.update(partitions=tuple(partitions[letter] for letter in order))


def _forward(equation, x, weight, out_sharding, dtype):  # type: ignore[no-untyped-def]
    return product(equation, x, weight, out_sharding, dtype), (x, weight)


def _backward(equation, out_sharding, dtype, operands, gradient):  # type: ignore[no-untyped-def]
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    dx = einsum(f"{y_letters},{weight_letters}->{x_letters}", gradient, weight, gradient_sharding(x))
    dw = einsum(f"{x_letters},{y_letters}->{weight_letters}", x, gradient, gradient_sharding(weight))
    return dx.astype(x.dtype), dw.astype(weight.dtype)


def gradient_sharding(x: jax.Array) -> PartitionSpec | None:
    """Returns the sharding of the gradient of x: unreduced where x is reduced, and the other way round."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return None
    return PartitionSpec(*sharding.spec.partitions, unreduced=sharding.spec.reduced, reduced=sharding.spec.unreduced)


product.defvjp(_forward, _backward)


@jax.custom_vjp
def weight_gradients_first(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
    """Returns its arguments; an optimization barrier in the backward pass saves memory.

    The barrier makes XLA compute the gradients of the weights before it continues from the gradient of x to earlier
    layers. Without it XLA may put off the weights' products, and so keep their operands or their unscattered sums.
    """
    return x, weights


weight_gradients_first.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))
