"""A linear map of the decoder: the product with a weight, wherever its shards are, and its bias where it has one."""

from collections.abc import Mapping

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from model.cpu import turned, turned_product
from model.product import product
from model.sharding import Layout


class Linear(nnx.Module):
    """y = einsum(equation, x, weight) + bias, in the dtype of x.

    Args:
        equation: such as "btd,df->btf".
        weights: of the floor; the map's are `name` and, if it is there, `name`_bias.
        name: of the map.
        axes: logical axes of the weight, in its order.
        layout: where the weight is.
        sums_over: the axis of the weight that is summed over to give residuals [B, T, D]; none: it gives no residuals.
    """

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
        of_x, of_weight, _ = equation.replace("->", ",").split(",")
        if layout.inputs_last:
            axes = tuple(axes[of_weight.index(letter)] for letter in turned(of_weight, of_x))
        self.equation, self.axes, self.layout, self.sums_over = equation, axes, layout, sums_over

    def __call__(self, x: jax.Array) -> jax.Array:
        """x → y. What leaves is named, so that remat can keep it."""
        weight = self.layout.gather(self.weight[...].astype(x.dtype), *self.axes)
        multiply = turned_product if self.layout.inputs_last else product
        if self.sums_over:
            sums_BTD = multiply(self.equation, x, weight, self.layout.partial_sums(self.sums_over))
            y = self.layout.scatter_time(sums_BTD)
        else:
            y = multiply(self.equation, x, weight)
        if self.bias is not None:
            of_x, of_weight, of_y = self.equation.replace("->", ",").split(",")
            own = (slice(None) if axis in of_weight and axis not in of_x else None for axis in of_y)
            y = y + self.bias[...].astype(x.dtype)[tuple(own)]
        return checkpoint_name(y, "product")
