"""The grouped product: rows sorted by expert, each times the matrix of its expert (Gale et al. 2022, arXiv:2211.15841).

`jax.lax.ragged_dot` is not enough for training: on GPUs XLA multiplies all rows by all experts, and on TPUs its
gradient copies all weights to transpose them. So each platform has kernels of its own, under one gradient rule. In
names of shapes M is rows, and K → N the widths.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from model.backend import platform
from model.feedforward import grouped_gpu

PLATFORM_KERNELS = {"tpu": "megablox", "gpu": "triton"}
# Largest tiles of the TPU's kernels, which then hold no more than the 16 MiB that the compiler gives them. Inputs are
# counted in bytes, outputs in numbers, since their sums are float32. A tile of few rows takes more inputs: if it takes
# all of them, the weights of an expert are read once.
X_TILE_BYTES = 2**20
WEIGHT_INPUT_BYTES = 4096
GRADIENT_INPUT_BYTES = 2048
OUTPUTS = 1024


def grouped_product(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    dtype: Any = None,
    expected: int | None = None,
    transposed: bool = False,
) -> jax.Array:
    """Returns y [M, N]: each row of x times the matrix of its expert, summed in float32.

    It is computed by the kernel for the ambient mesh, on one device: on several, call it inside
    `jax.shard_map(check_vma=False)`. The gradients are rounded to the dtype of their operands.

    Args:
        x_MK: rows sorted by expert, in float32 or bfloat16; they are multiplied in the dtype of w.
        w_EKN: a matrix for each expert.
        sizes_E: rows of each expert, int32, at most M together. The rows of y behind them are undefined, and so are
            those of the gradient of x; the gradient of w doesn't depend on the rows of x or of y's gradient there.
        dtype: the dtype of y; by default that of w.
        expected: the sum of sizes_E that `ziggurat plan` is to count; by default M.
        transposed: whether the matrices are [E, N, K].
    """
    return product_by(PLATFORM_KERNELS.get(platform(), "ragged"), x_MK, w_EKN, sizes_E, dtype, expected, transposed)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5, 6))
def product_by(
    kernel: str,
    x_MK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    dtype: Any = None,
    expected: int | None = None,
    transposed: bool = False,
) -> jax.Array:
    """Returns `grouped_product` by one kernel: megablox, triton or ragged.

    The first two are interpreted, slowly, on other platforms than their own.
    """
    return _rows(kernel, x_MK, w_EKN, sizes_E, dtype or w_EKN.dtype, expected, transposed)


def _forward(kernel, x_MK, w_EKN, sizes_E, dtype, expected, transposed):  # type: ignore[no-untyped-def]
    return product_by(kernel, x_MK, w_EKN, sizes_E, dtype, expected, transposed), (x_MK, w_EKN, sizes_E)


def _backward(kernel, _, expected, transposed, operands, dy_MN):  # type: ignore[no-untyped-def]
    x_MK, w_EKN, sizes_E = operands
    dx_MK = _rows(kernel, dy_MN, w_EKN, sizes_E, x_MK.dtype, expected, not transposed)
    x_MK, dy_MN = x_MK.astype(w_EKN.dtype), dy_MN.astype(w_EKN.dtype)
    rows = (dy_MN, x_MK) if transposed else (x_MK, dy_MN)
    return dx_MK, _weights(kernel, *rows, sizes_E, expected), None


product_by.defvjp(_forward, _backward)


def _rows(
    kernel: str,
    x_MK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    dtype: Any,
    expected: int | None,
    transposed: bool,
) -> jax.Array:
    """Returns each row times its expert's matrix or, transposed, times that of shape [N, K]."""
    x_MK = x_MK.astype(w_EKN.dtype)
    (M, K), E = x_MK.shape, sizes_E.size
    tile = rows_tile(M, E, 128 if K * x_MK.dtype.itemsize <= WEIGHT_INPUT_BYTES else 256)
    with _counted(kernel, "grouped_rows", expected or M, E, tile):
        if kernel == "megablox":
            return _megablox_rows(x_MK, w_EKN, sizes_E, dtype, transposed, tile)
        if kernel == "triton":
            return grouped_gpu.grouped_rows(x_MK, w_EKN, sizes_E, dtype, transposed, interpret=platform() != "gpu")
        w_EKN = w_EKN.swapaxes(1, 2) if transposed else w_EKN
        return jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, preferred_element_type=jnp.float32).astype(dtype)


def _weights(kernel: str, x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array, expected: int | None) -> jax.Array:
    """Returns the gradient of the matrices, [E, K, N]: for each expert the sum over its rows of x ⊗ dy."""
    M, E = len(x_MK), sizes_E.size
    tile = rows_tile(M, E)
    with _counted(kernel, "grouped_weights", expected or M, E, tile):
        if kernel == "megablox":
            return _megablox_weights(x_MK, dy_MN, sizes_E, tile)
        if kernel == "triton":
            return grouped_gpu.grouped_weights(x_MK, dy_MN, sizes_E, interpret=platform() != "gpu")
        numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        dw_EKN = jax.lax.ragged_dot_general(x_MK, dy_MN, sizes_E, numbers, preferred_element_type=jnp.float32)
        return dw_EKN.astype(x_MK.dtype)


def _counted(kernel: str, name: str, rows: int, E: int, tile: int) -> Any:
    """Names the kernel's operation in the program, and states there how many rows it multiplies for E experts."""
    return jax.named_scope(f"{name}_{rows + wasted_rows(kernel, E, tile)}")


def wasted_rows(kernel: str, E: int, tile: int) -> int:
    """Returns how many rows a kernel multiplies in vain.

    A tile of megablox with rows of several experts is multiplied for each of them. Triton's tiles have rows of one
    expert, the last of which is half full in the mean.
    """
    return {"megablox": (E - 1) * tile, "triton": E * grouped_gpu.TILE // 2}.get(kernel, 0)


def _megablox_rows(
    x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array, dtype: Any, transposed: bool, tile: int
) -> jax.Array:
    """Runs Pallas megablox (TPU), which reads a transposed matrix as it is."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (M, K), N, itemsize = x_MK.shape, w_EKN.shape[1 if transposed else 2], x_MK.dtype.itemsize
    inputs = min(X_TILE_BYTES // tile, WEIGHT_INPUT_BYTES) // itemsize
    tiles = (tile, _tile(K, inputs), _tile(N, OUTPUTS, _cores()))
    y_MN = gmm(
        _padded(x_MK, tile), w_EKN, sizes_E, dtype, tiles, transpose_rhs=transposed, interpret=platform() != "tpu"
    )
    return y_MN[:M]


def _megablox_weights(x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array, tile: int) -> jax.Array:
    """Runs megablox's product over rows (TPU). It swaps the axes of x back, so that nothing is copied."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    K, N = x_MK.shape[1], dy_MN.shape[1]
    tiles = (tile, _tile(K, GRADIENT_INPUT_BYTES // x_MK.dtype.itemsize), _tile(N, OUTPUTS, _cores()))
    x_KM = _padded(x_MK, tile).swapaxes(0, 1)
    return tgmm(x_KM, _padded(dy_MN, tile), sizes_E, x_MK.dtype, tiles, interpret=platform() != "tpu")


def rows_tile(M: int, E: int, least: int = 256) -> int:
    """Returns the rows of a tile of megablox, which are `least` for experts that have few rows.

    Megablox multiplies a whole tile once for each expert that has rows in it, so E experts cost up to E − 1 tiles more
    than M rows have. Larger tiles are for experts that have many rows, and where weights are read for each tile.
    """
    largest = 512 if M >= 2048 * E else 256 if M >= 512 * E else least
    divisors = [tile for tile in (512, 256, 128) if tile <= largest and M % tile == 0]
    return divisors[0] if divisors else min(largest, -(-M // 16) * 16)


def _tile(width: int, limit: int, cores: int = 1) -> int:
    """Returns the length of equal tiles of a width: all of it, or a multiple of the 128 lanes of a register.

    Each of several cores gets as many of them.
    """
    tiles = -(-width // (limit * cores)) * cores
    return min(width, -(-width // (tiles * 128)) * 128)


def _cores() -> int:
    """Returns the cores of a device, which share the outputs of a kernel: a TPU v4 or v5p has two."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def _padded(x_MK: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x_MK, ((0, -x_MK.shape[0] % tile), (0, 0)))
