"""A linear map of the decoder: the product with a weight, wherever its shards are, and an optional bias."""

from collections.abc import Mapping
from functools import partial

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.collectives import gather_weight, partial_sums, scatter_time
from model.product import product
from model.quantized_product import quantized_product
from model.sharding import Layout


class Linear(nnx.Module):
    """y = einsum(equation, x, weight) + bias, in the dtype of x.

    Args:
        equation: an einsum such as "btd,df->btf".
        weights: the arrays of the floor: `name` and, if the map has a bias, `name`_bias.
        axes: logical axes of the weight, in its order.
        sums_over: the weight's axis that is summed over, if the result is residuals [B, T, D].
    """

    multiply = staticmethod(product)

    def __init__(
        self,
        equation: str,
        weights: Mapping[str, jax.Array],
        name: str,
        axes: tuple[str, ...],
        layout: Layout,
        sums_over: str | None = None,
    ):
        self.weight = nnx.Param(weights[name])
        self.bias = nnx.Param(weights[f"{name}_bias"]) if f"{name}_bias" in weights else None
        self.name = name
        self.equation = equation
        self.axes = axes
        self.layout = layout
        self.sums_over = sums_over

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x to y, which has the weight's name for remat policies."""
        y = self.product(x)
        if self.bias is not None:
            x_letters, weight_letters, y_letters = self.equation.replace("->", ",").split(",")
            outputs = set(weight_letters) - set(x_letters)
            shape = tuple(slice(None) if letter in outputs else None for letter in y_letters)
            y = y + self.bias[...].astype(x.dtype)[shape]
        return checkpoint_name(y, self.name)

    def product(self, x: jax.Array) -> jax.Array:
        """Returns the product with the weight alone."""
        weight = gather_weight(self.weight[...].astype(x.dtype), self.layout, *self.axes)
        if not self.sums_over:
            return self.multiply(self.equation, x, weight)
        sums_BTD = self.multiply(self.equation, x, weight, partial_sums(self.layout, self.sums_over))
        return scatter_time(sums_BTD, self.layout)


class Float8Linear(Linear):
    """`Linear` by products of float8."""

    multiply = staticmethod(partial(quantized_product, "float8"))


class Int8Linear(Linear):
    """`Linear` by products of int8."""

    multiply = staticmethod(partial(quantized_product, "int8"))


# The linear maps of training by `model.matmul_dtype`.
LINEARS: dict[str | None, type[Linear]] = {None: Linear, "float8": Float8Linear, "int8": Int8Linear}
