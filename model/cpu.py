"""Faster forms of the decoder's parts for XLA's CPU backend. Each is chosen on CPUs alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from model.backend import on_one_cpu
from model.collectives import gather_weight
from model.linear import Linear
from model.product import permuted, product
from model.unembedding import Unembedding, mask_padding

# The most layers that are unrolled: the program's size and compile time grow with them.
MOST_UNROLLED = 12
# Blocks of queries, and the fewest queries of one.
MOST_BLOCKS, LEAST_BLOCK = 4, 256


def scan_layers(layer: Any, x: Any, stacked: Any) -> tuple[Any, Any]:
    """`jax.lax.scan` over layers; for few layers on a mesh of one CPU, an unrolled Python loop.

    A scan stacks the activations that each layer leaves for the backward pass, which takes a tenth of a CPU's step.
    """
    num_layers = len(jax.tree.leaves(stacked)[0])
    if not on_one_cpu() or num_layers > MOST_UNROLLED:
        return jax.lax.scan(layer, x, stacked)
    results = []
    for number in range(num_layers):
        x, result = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], stacked))
        results.append(result)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def attend_in_blocks(
    attend: Callable[..., jax.Array], q_BHTC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_B1TS: jax.Array
) -> jax.Array:
    """`attend`, without dropout, in blocks of queries, each over the keys that the causal mask may leave visible.

    With four blocks that is five eighths of the scores. On other platforms a kernel does the same.
    """
    T = q_BHTC.shape[2]
    block = max(T // MOST_BLOCKS, LEAST_BLOCK)
    if T % block:
        block = T
    return jnp.concatenate(
        [
            attend(
                q_BHTC[:, :, end - block : end], k_BKSC[:, :, :end], v_BKSC[:, :, :end],
                mask_B1TS[:, :, end - block : end, :end],
            )
            for end in range(block, T + 1, block)
        ],
        axis=2,
    )  # fmt: skip


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

    With one token per sequence it computes (W xᵀ)ᵀ: XLA's CPU matmul then streams W in its stored order, where x W
    would first pack W into blocks, which takes twice as long.

    Args:
        equation: an einsum whose letter t is the position in x.
    """
    x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
    if x.shape[x_letters.index("t")] > 1:
        return product(equation, x, weight, out_sharding, dtype)
    column_letters = _contracted_last(y_letters, x_letters)
    out_sharding = out_sharding and permuted(out_sharding, y_letters, column_letters)
    columns = product(f"{weight_letters},{x_letters}->{column_letters}", weight, x, out_sharding, dtype)
    # Without the barrier XLA computes x W after all, which spares it the transposition of the result.
    columns = jax.lax.optimization_barrier(columns)
    return jnp.transpose(columns, [column_letters.index(letter) for letter in y_letters])


def _contracted_last(letters: str, x_letters: str) -> str:
    return "".join(sorted(letters, key=lambda letter: letter in x_letters))


class ColumnLinear(Linear):
    """`Linear` by `column_product`, whose weight is stored with the contracted axes last."""

    multiply = staticmethod(column_product)

    def __init__(self, equation: str, weights: Any, name: str, axes: tuple[str, ...], *args: Any, **kwargs: Any):
        x_letters, weight_letters, y_letters = equation.replace("->", ",").split(",")
        stored_letters = _contracted_last(weight_letters, x_letters)
        stored_axes = tuple(axes[weight_letters.index(letter)] for letter in stored_letters)
        super().__init__(f"{x_letters},{stored_letters}->{y_letters}", weights, name, stored_axes, *args, **kwargs)


class ColumnUnembedding(Unembedding):
    """`Unembedding` by `column_product`; its own matrix is stored as [V, D]."""

    def __call__(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        x_BTD = self.layout.reshard(x_BTD, "batch", "time", None)
        matrix_VD = table_VD if self.matrix is None else self.matrix[...]
        matrix_VD = gather_weight(matrix_VD.astype(self.config.compute_dtype), self.layout, "vocabulary", "model")
        scores = column_product("btd,vd->btv", x_BTD, matrix_VD, dtype=jnp.float32)
        return mask_padding(scores, self.config.vocab_size)
