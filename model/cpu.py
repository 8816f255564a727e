"""What makes XLA's CPU programs faster, kept out of the model's own files."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.product import _einsum

# The most layers that a program for one CPU writes out.
WRITTEN_OUT = 12


def unrolled_scan(layer: Any, x: Any, of_layers: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` as a program that repeats itself.

    A scan is one program for any number of layers, but stacks what each leaves for the backward pass: a tenth of a
    CPU's step.
    """
    told = []
    for number in range(len(jax.tree.leaves(of_layers)[0])):
        x, of_layer = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], of_layers))
        told.append(of_layer)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *told)


def turned(of_weight: str, of_x: str) -> str:
    """The letters of a weight, those that its product with x sums over last."""
    return "".join(sorted(of_weight, key=lambda letter: letter in of_x))


def turned_product(
    equation: str, x: jax.Array, weight: jax.Array, out_sharding: PartitionSpec | None = None, dtype: Any = None
) -> jax.Array:
    """`product`, of a weight whose axes are in the order of `turned`; not for gradients.

    Of a row a sequence, the rows become the columns of what the weight is multiplied with: a CPU then reads the weight
    once, as it lies, where else it copies it into blocks first, which takes twice as long.

    Args:
        equation: as if the weight were not turned.
        x: activations, positions at axis 1.
        weight: in the same dtype.
        out_sharding: of the result, where it does not follow from the operands.
        dtype: of the result; by default that of `x`.
    """
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    of_weight = turned(of_weight, of_x)
    if x.shape[of_x.index("t")] > 1:
        return _einsum(f"{of_x},{of_weight}->{of_y}", x, weight, out_sharding).astype(dtype or x.dtype)
    of_columns = turned(of_y, of_x)
    if out_sharding is not None:
        partitions = dict(zip(of_y, out_sharding.partitions, strict=True))
        out_sharding = out_sharding.update(partitions=tuple(partitions[letter] for letter in of_columns))
    columns = _einsum(f"{of_weight},{of_x}->{of_columns}", weight, x, out_sharding)
    # Else the compiler takes the rows first again, because it then needs not turn the result.
    columns = jax.lax.optimization_barrier(columns.astype(dtype or x.dtype))
    return jnp.transpose(columns, [of_columns.index(letter) for letter in of_y])
