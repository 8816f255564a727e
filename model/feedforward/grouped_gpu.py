"""The grouped product's Pallas-Triton kernels, for GPUs: each program computes one tile, which has one expert."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# A program computes TILE × TILE results and sums over SUMMED_BYTES of each row at a time: three stages of two operands
# take 96 KiB of shared memory, which all GPUs since 2020 have.
TILE = 128
SUMMED_BYTES = 128
PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=3)


def grouped_rows(
    x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, dtype: Any, transposed: bool, interpret: bool
) -> jax.Array:
    """Returns each row times its expert's matrix or, transposed, times that of shape [N, K]."""
    (M, K), N = x_MK.shape, w_EKN.shape[1 if transposed else 2]
    columns, step = pl.cdiv(N, TILE), SUMMED_BYTES // x_MK.dtype.itemsize
    experts, begins, ends = _row_tiles(M, sizes_E)

    def kernel(x_ref: Any, w_ref: Any, experts_ref: Any, begins_ref: Any, ends_ref: Any, y_ref: Any) -> None:
        # Neighbours in time share their rows, and then their expert.
        tile, column = pl.program_id(0) // columns, pl.program_id(0) % columns
        expert, begin, end = experts_ref[tile], begins_ref[tile], ends_ref[tile]
        rows, has_row = _span(begin, TILE, end)
        outputs, has_output = _span(column * TILE, TILE, N)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            inputs, has_input = _span(i * step, step, K)
            x = _load(x_ref.at[rows, inputs], has_row, has_input)
            if transposed:
                w = _load(w_ref.at[expert, outputs, inputs], has_output, has_input).T
            else:
                w = _load(w_ref.at[expert, inputs, outputs], has_input, has_output)
            return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

        @pl.when(begin < end)
        def _() -> None:
            total = jax.lax.fori_loop(0, pl.cdiv(K, step), add, jnp.zeros((TILE, TILE), jnp.float32))
            triton.store(y_ref.at[rows, outputs], total.astype(dtype), mask=_both(has_row, has_output))

    return _call(
        kernel, "grouped_rows", experts.size * columns, jax.ShapeDtypeStruct((M, N), dtype), (x_MK, w_EKN),
        (experts, begins, ends), interpret,
    )  # fmt: skip


def grouped_weights(x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array, interpret: bool) -> jax.Array:
    """Returns the gradient of the matrices, [E, K, N]: for each expert the sum over its rows of x ⊗ dy."""
    K, N, E, dtype = x_MK.shape[1], dy_MN.shape[1], sizes_E.size, x_MK.dtype
    across, down, step = pl.cdiv(N, TILE), pl.cdiv(K, TILE), SUMMED_BYTES // dtype.itemsize
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)

    def kernel(x_ref: Any, dy_ref: Any, begins_ref: Any, ends_ref: Any, dw_ref: Any) -> None:
        tile, column = pl.program_id(0) // across, pl.program_id(0) % across
        expert, row = tile // down, tile % down
        begin, end = begins_ref[expert], ends_ref[expert]
        inputs, has_input = _span(row * TILE, TILE, K)
        outputs, has_output = _span(column * TILE, TILE, N)

        def add(i: jax.Array, total: jax.Array) -> jax.Array:
            rows, has_row = _span(begin + i * step, step, end)
            x = _load(x_ref.at[rows, inputs], has_row, has_input)
            dy = _load(dy_ref.at[rows, outputs], has_row, has_output)
            return total + jnp.dot(x.T, dy, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, pl.cdiv(end - begin, step), add, jnp.zeros((TILE, TILE), jnp.float32))
        triton.store(dw_ref.at[expert, inputs, outputs], total.astype(dtype), mask=_both(has_input, has_output))

    return _call(
        kernel, "grouped_weights", E * down * across, jax.ShapeDtypeStruct((E, K, N), dtype), (x_MK, dy_MN),
        (ends - sizes_E, ends), interpret,
    )  # fmt: skip


def _row_tiles(M: int, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns of each tile of rows the expert, the first row, and the end of the expert's rows.

    An expert's first tile begins at its first row. Tiles that are left over begin behind the last expert's rows.
    """
    E = sizes_E.size
    tiles = jnp.arange(pl.cdiv(M, TILE) + E, dtype=jnp.int32)
    ends = jnp.cumsum(sizes_E, dtype=jnp.int32)
    tiles_E = pl.cdiv(sizes_E, TILE)
    last_tiles = jnp.cumsum(tiles_E, dtype=jnp.int32)
    experts = jnp.minimum(jnp.sum(tiles[:, None] >= last_tiles, axis=1, dtype=jnp.int32), E - 1)
    begins = (ends - sizes_E)[experts] + (tiles - (last_tiles - tiles_E)[experts]) * TILE
    return experts, begins, ends[experts]


def _span(begin: Any, length: int, end: Any) -> tuple[Any, jax.Array | None]:
    """Returns a slice and which of its indices lie before the end, or None where all do whatever the program."""
    if isinstance(end, int) and end % length == 0:
        return pl.ds(begin, length), None
    return pl.ds(begin, length), begin + jnp.arange(length) < end


def _both(has_row: jax.Array | None, has_column: jax.Array | None) -> jax.Array | None:
    """Returns the mask of a tile whose rows and columns have these masks."""
    if has_row is None:
        return None if has_column is None else has_column[None]
    if has_column is None:
        return has_row[:, None]
    return has_row[:, None] & has_column[None]


def _load(ref: Any, has_row: jax.Array | None, has_column: jax.Array | None) -> jax.Array:
    """Loads a tile, with zeros where its array has no numbers."""
    mask = _both(has_row, has_column)
    return triton.load(ref, mask=mask, other=None if mask is None else 0.0)


def _call(
    kernel: Any,
    name: str,
    programs: int,
    result: jax.ShapeDtypeStruct,
    operands: tuple[jax.Array, jax.Array],
    spans: tuple[jax.Array, ...],
    interpret: bool,
) -> jax.Array:
    """Runs the kernel in a number of programs, each of which cuts its tiles out of whole arrays.

    Blocks of Pallas's own would be chosen by the program's number alone, but a tile's place depends on the sizes.
    """
    M, K = operands[0].shape
    bytes_accessed = sum(x.size * x.dtype.itemsize for x in (*operands, result))
    return pl.pallas_call(
        kernel,
        out_shape=result,
        in_specs=[pl.no_block_spec] * (len(operands) + len(spans)),
        out_specs=pl.no_block_spec,
        grid=(programs,),
        compiler_params=PARAMETERS,
        interpret=interpret,
        name=name,
        cost_estimate=pl.CostEstimate(
            flops=2 * M * K * result.shape[-1], bytes_accessed=bytes_accessed, transcendentals=0
        ),
    )(*operands, *spans)
