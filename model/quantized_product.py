"""Products of 8-bit numbers with a scale for each row and each column, which some chips compute twice as fast.

Each operand is divided by a scale for every slice along the summed axes, so that its largest magnitude there is near
the largest that the dtype holds, and rounded. So a position's result depends on no other position, nor on how the batch
is sharded. The forward product and the gradient of the activations are computed so; the gradient of the weight, a sum
over the positions of all devices, stays in the compute dtype. This is rowwise scaling with gradients of weights in high
precision (torchao's `rowwise_with_gw_hp`; AQT's default for int8); float8 is the e4m3 of Micikevicius et al. 2022
(arXiv:2209.05433).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.backend import platform
from model.product import einsum, gradient_sharding

# By `model.matmul_dtype`. With a scale for each row, gradients do not need the range of e5m2, which rounds more.
DTYPES = {"float8": jnp.float8_e4m3fn, "int8": jnp.int8}
# The least scale is this power of two; smaller numbers become zeros.
LEAST_EXPONENT = -100
# The bits of a float32 that hold its exponent.
EXPONENT_BITS = 0x7F800000


class Quantized(NamedTuple):
    """An array is about `numbers` × `scale`; the float32 scale has size 1 along the summed axes."""

    numbers: jax.Array
    scale: jax.Array


def quantize(x: jax.Array, axes: tuple[int, ...], dtype: Any) -> Quantized:
    """Rounds an array to 8-bit numbers, nearest with ties to even, with a scale for each slice along `axes`.

    Scales of float8 are powers of two, by which products are exact. Where a slice has NaN or infinite values, so has
    numbers × scale.
    """
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32)
    if dtype == jnp.int8:
        scale = jnp.maximum(largest / 127, 2.0**LEAST_EXPONENT)
        return Quantized(jnp.round(x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)
    # The power of two below the largest magnitude is in its bits; twice as much leaves the magnitude in [1/2, 1) of the
    # greatest finite number. (XLA would gather the integers of `jnp.frexp` from all devices.)
    bits = jax.lax.bitcast_convert_type(largest / float(jnp.finfo(dtype).max), jnp.int32)
    below = jax.lax.bitcast_convert_type(bits & EXPONENT_BITS, jnp.float32)
    scale = jnp.maximum(2 * below, 2.0**LEAST_EXPONENT)
    return Quantized((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 4))
def quantized_product(
    matmul_dtype: str, equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """Returns `model.product.product` in the dtype of x, of operands that are rounded to 8 bits.

    Args:
        matmul_dtype: float8 or int8.
        equation: an einsum such as "btd,df->btf"; each letter is in two of its three terms.
        out_sharding: the result's sharding, where it does not follow from the operands.
    """
    dtype = DTYPES[matmul_dtype]
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    of_x = quantize(_plain(x), _axes_without(y_letters, x_letters), dtype)
    of_weight = quantize(_plain(weight), _axes_without(y_letters, weight_letters), dtype)
    sums = _sums(equation, of_x.numbers, of_weight.numbers, out_sharding, x.dtype)
    return _scaled(sums, y_letters, {x_letters: of_x.scale, weight_letters: of_weight.scale}).astype(x.dtype)


def _forward(matmul_dtype, equation, x, weight, out_sharding):  # type: ignore[no-untyped-def]
    return quantized_product(matmul_dtype, equation, x, weight, out_sharding), (x, weight)


def _backward(matmul_dtype, equation, out_sharding, operands, gradient):  # type: ignore[no-untyped-def]
    x, weight = operands
    gradient = gradient.astype(x.dtype)
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    dtype = DTYPES[matmul_dtype]
    # The weight is rounded as in the forward pass. The scales of its columns are factors of the gradient.
    of_weight = quantize(_plain(weight), _axes_without(y_letters, weight_letters), dtype)
    scaled = _scaled(_plain(gradient), y_letters, {weight_letters: of_weight.scale})
    of_gradient = quantize(scaled, _axes_without(x_letters, y_letters), dtype)
    to_x = f"{y_letters},{weight_letters}->{x_letters}"
    sums = _sums(to_x, of_gradient.numbers, of_weight.numbers, gradient_sharding(x), x.dtype)
    dx = _scaled(sums, x_letters, {y_letters: of_gradient.scale})
    dw = einsum(f"{x_letters},{y_letters}->{weight_letters}", x, gradient, gradient_sharding(weight))
    return dx.astype(x.dtype), dw.astype(weight.dtype)


quantized_product.defvjp(_forward, _backward)


def _axes_without(kept: str, letters: str) -> tuple[int, ...]:
    """Returns the axes of an array with these letters that the result of a product, with those kept, has not."""
    return tuple(axis for axis, letter in enumerate(letters) if letter not in kept)


def _sums(equation: str, x: jax.Array, y: jax.Array, out_sharding: PartitionSpec | None, dtype: Any) -> jax.Array:
    """Returns the einsum of 8-bit numbers in float32, or of float8 in `dtype`."""
    if platform() == "cpu":
        # bfloat16 holds them all. Without the barrier XLA may take the numbers before they were rounded.
        x, y = jax.lax.optimization_barrier((x, y))
        sums = einsum(equation, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), out_sharding)
    else:
        summed_in = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        sums = jnp.einsum(equation, x, y, preferred_element_type=summed_in, out_sharding=out_sharding)
    # A product with float8's scales rounds nothing, so the sums are rounded first: half the traffic on a GPU.
    return sums.astype(jnp.float32 if x.dtype == jnp.int8 else dtype)


def _scaled(x: jax.Array, letters: str, scales: dict[str, jax.Array]) -> jax.Array:
    """Returns the product, in float32, of an array with scales, given by their letters; some are not in `letters`."""
    spec = jax.typeof(x).sharding.spec
    for scale_letters, scale in scales.items():
        scale = jnp.squeeze(scale, _axes_without(letters, scale_letters))
        own = "".join(letter for letter in scale_letters if letter in letters)
        scale = jnp.transpose(scale, [own.index(letter) for letter in letters if letter in own])
        scale = jnp.expand_dims(scale, [axis for axis, letter in enumerate(letters) if letter not in own])
        if spec.unreduced:
            # The type of a factor of unreduced sums is reduced.
            partitions = jax.typeof(scale).sharding.spec.partitions
            scale = jax.reshard(scale, PartitionSpec(*partitions, reduced=spec.unreduced))
        x = x * scale
    return x


def _plain(x: jax.Array) -> jax.Array:
    """Returns x as an array of which no gradient is taken, neither reduced nor unreduced."""
    sharding = jax.typeof(x).sharding
    return x if sharding.mesh.empty else jax.reshard(x, PartitionSpec(*sharding.spec.partitions))
