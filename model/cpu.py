"""Faster forms of the decoder's parts for XLA's CPU backend. Each is chosen on CPUs alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from model.backend import platform
from model.collectives import gather_weight
from model.linear import Linear
from model.product import einsum
from model.unembedding import Unembedding, mask_padding

# The most layers that are unrolled: the program's size and compile time grow with them.
MOST_UNROLLED = 12


def scan_layers(layer: Any, x: Any, stacked: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over layers; for few layers on a mesh of one CPU, an unrolled Python loop.

    A scan stacks the activations that each layer leaves for the backward pass, which takes a tenth of a CPU's step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_layers = len(jax.tree.leaves(stacked)[0])
    on_one_cpu = mesh.size == 1 and mesh.abstract_device is not None and platform() == "cpu"
    if not on_one_cpu or num_layers > MOST_UNROLLED:
        return jax.lax.scan(layer, x, stacked)
    results = []
    for number in range(num_layers):
        x, result = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], stacked))
        results.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def contracted_last(weight_letters: str, x_letters: str) -> str:
    """Returns the einsum letters of a weight with those of its contracted axes moved last."""
    return "".join(sorted(weight_letters, key=lambda letter: letter in x_letters))


def column_product(
    equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None, dtype: Any = None
) -> jax.Array:
    """`model.product.product` with a weight whose contracted axes come last; not for training.

    With one token per sequence it computes (W xᵀ)ᵀ: XLA's CPU matmul then streams W in its stored order, where x W
    would first pack W into blocks, which takes twice as long.

    Args:
        equation: the einsum for the weight in its usual order.
        x: activations with the positions at axis 1.
        weight: transposed as by `contracted_last`, in the dtype of x.
    """
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    weight_letters = contracted_last(weight_letters, x_letters)
    if x.shape[x_letters.index("t")] > 1:
        return einsum(f"{x_letters},{weight_letters}->{y_letters}", x, weight, out_sharding).astype(dtype or x.dtype)
    column_letters = contracted_last(y_letters, x_letters)
    if out_sharding is not None:
        partitions = dict(zip(y_letters, out_sharding.partitions, strict=True))
        out_sharding = out_sharding.update(partitions=tuple(partitions[letter] for letter in column_letters))
    columns = einsum(f"{weight_letters},{x_letters}->{column_letters}", weight, x, out_sharding)
    # Without the barrier XLA computes x W after all, which spares it the transposition of the result.
    columns = jax.lax.optimization_barrier(columns.astype(dtype or x.dtype))
    return jnp.transpose(columns, [column_letters.index(letter) for letter in y_letters])


class ColumnLinear(Linear):
    """`Linear` by `column_product`; its weight is transposed as by `contracted_last`."""

    multiply = staticmethod(column_product)

    def gathered_weight(self, dtype: DTypeLike) -> jax.Array:
        """Returns the weight for use in a product, with its axes in the transposed order."""
        x_letters, weight_letters, _ = self.equation.replace("->", ",").split(",")
        axes = (self.axes[weight_letters.index(letter)] for letter in contracted_last(weight_letters, x_letters))
        return gather_weight(self.weight[...].astype(dtype), self.layout, *axes)


class ColumnUnembedding(Unembedding):
    """`Unembedding` by `column_product`; its own matrix is transposed to [V, D]."""

    def __call__(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        x_BTD = self.layout.reshard(x_BTD, "batch", "time", None)
        matrix_VD = table_VD if self.matrix is None else self.matrix[...]
        matrix_VD = gather_weight(matrix_VD.astype(self.config.compute_dtype), self.layout, "vocabulary", "model")
        scores = column_product("btd,dv->btv", x_BTD, matrix_VD, dtype=jnp.float32)
        return mask_padding(scores, self.config.vocab_size)
