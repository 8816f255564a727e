"""Faster forms of the decoder's parts for XLA's CPU backend. Each is chosen on CPUs alone."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from model.collectives import gather_weight
from model.config import ResolvedModelConfig
from model.linear import Linear
from model.product import product
from model.sharding import Layout
from model.unembedding import Unembedding, finished

# The most rows of activations that are multiplied as columns.
FEW_ROWS = 32


def computed_once(x: jax.Array) -> jax.Array:
    """Returns finite float32 x [..., C], which every fusion that uses it then reads.

    XLA's CPU compiler ignores optimization barriers when it fuses, and computes x again in each fusion. It never does
    so with the result of a matrix product; this one is exact.
    """
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype))


def column_product(
    equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None, dtype: Any = None
) -> jax.Array:
    """`model.product.product` with a weight whose contracted axes come last; not for training.

    On one device it is a product of two matrices, which XLA's CPU backend multiplies in their stored order. A product
    of more axes would transpose the activations or the weight first.

    Args:
        equation: an einsum such as "btd,hcd->bhtc"; the letters that only x and the weight have are summed over.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return product(equation, x, weight, out_sharding, dtype)
    return _as_matrices(equation, x, weight, partial(_matrix_product, dtype=dtype or x.dtype))


def _as_matrices(
    equation: str, x: jax.Array, weight: jax.Array, multiply: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Computes an einsum by a function of matrices x [M, K] and weight [N, K], which returns [M, N]."""
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    rows = [letter for letter in x_letters if letter not in weight_letters]
    contracted = [letter for letter in weight_letters if letter in x_letters]
    outputs = [letter for letter in weight_letters if letter not in x_letters]
    size = dict(zip(x_letters + weight_letters, x.shape + weight.shape, strict=True))
    K = math.prod(size[letter] for letter in contracted)
    x_MK = jnp.transpose(x, [x_letters.index(letter) for letter in rows + contracted]).reshape(-1, K)
    y = multiply(x_MK, weight.reshape(-1, K)).reshape([size[letter] for letter in rows + outputs])
    return jnp.transpose(y, [(rows + outputs).index(letter) for letter in y_letters])


def _matrix_product(x_MK: jax.Array, weight_NK: jax.Array, dtype: Any) -> jax.Array:
    """Returns x Wᵀ [M, N]; of few rows as (W xᵀ)ᵀ, which streams W where x Wᵀ packs it into blocks first.

    A single row is computed twice: XLA's CPU backend has one thread for a matrix and a vector, all for two matrices.
    """

    def multiply(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        if dtype == jnp.int32:
            return jnp.einsum(equation, left, right, preferred_element_type=dtype)
        return product(equation, left, right, None, dtype)

    M = len(x_MK)
    if M > FEW_ROWS:
        return multiply("mk,nk->mn", x_MK, weight_NK)
    if M == 1:
        x_MK = jnp.pad(x_MK, ((0, 1), (0, 0)))
    # Without the barrier XLA computes x Wᵀ after all, which spares it the transposition of the result.
    y_NM = jax.lax.optimization_barrier(multiply("nk,mk->nm", weight_NK, x_MK))
    return y_NM.T[:M]


def quantized(weight: jax.Array, contracted: int) -> tuple[jax.Array, jax.Array]:
    """Returns int8 whole numbers and their float32 scale for each index of the axes before the last `contracted`.

    The largest magnitude along the contracted axes becomes 127.
    """
    axes = tuple(range(weight.ndim - contracted, weight.ndim))
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def int8_product(equation: str, x: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    """`column_product` with a weight that is `quantized`, on one device, in float32.

    Each position of x is quantized, too, so that all products are of whole numbers, which every processor sums
    exactly: int32 holds the sums of 130,000 of them. A result never depends on other rows, not even in its last bit.
    """

    def multiply(x_MK: jax.Array, weight_NK: jax.Array) -> jax.Array:
        numbers_MK, scale_M = quantized(x_MK, 1)
        sums_MN = _matrix_product(numbers_MK, weight_NK, jnp.int32)
        return sums_MN.astype(jnp.float32) * scale_M[:, None] * scale.reshape(-1)

    return _as_matrices(equation, x, weight, multiply)


class ColumnLinear(Linear):
    """`Linear` by `column_product`, or by `int8_product` where there is a `name`_scale.

    The weight is stored with the contracted axes last.
    """

    multiply = staticmethod(column_product)

    def __init__(self, equation: str, weights: Any, name: str, axes: tuple[str, ...], *args: Any, **kwargs: Any):
        x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
        stored_letters = "".join(sorted(weight_letters, key=lambda letter: letter in x_letters))
        stored_axes = tuple(axes[weight_letters.index(letter)] for letter in stored_letters)
        super().__init__(f"{x_letters},{stored_letters}->{y_letters}", weights, name, stored_axes, *args, **kwargs)
        self.scale = nnx.Param(weights[f"{name}_scale"]) if f"{name}_scale" in weights else None

    def product(self, x: jax.Array) -> jax.Array:
        """Returns the product with the weight alone."""
        if self.scale is None:
            return super().product(x)
        return int8_product(self.equation, x, self.weight[...], self.scale[...]).astype(x.dtype)


class ColumnUnembedding(Unembedding):
    """`Unembedding` by `column_product`, or by `int8_product`; its own matrix is stored as [V, D]."""

    def __init__(self, config: ResolvedModelConfig, weights: Mapping[str, jax.Array] | None, layout: Layout):
        super().__init__(config, weights, layout)
        self.scale = nnx.Param(weights["matrix_scale"]) if weights and "matrix_scale" in weights else None

    def __call__(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        x_BTD = self.layout.reshard(x_BTD, "batch", "time", None)
        matrix_VD = table_VD if self.matrix is None else self.matrix[...]
        if self.scale is None:
            matrix_VD = gather_weight(matrix_VD.astype(self.config.compute_dtype), self.layout, "vocabulary", "model")
            scores = column_product("btd,vd->btv", x_BTD, matrix_VD, dtype=jnp.float32)
        else:
            scores = int8_product("btd,vd->btv", x_BTD, matrix_VD, self.scale[...])
        return finished(scores, self.config)
