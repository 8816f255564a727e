"""The grouped product is that of each expert's rows with its matrix, by every kernel; no compiler makes it dense."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.feedforward.grouped import _tile, grouped_product, product_by
from tests.peers import require
from tests.small import mesh_of
from train.planning.hlo import Instruction, computations_of
from train.planning.topology import topology_devices, without_jax_cache

KERNELS = ("ragged", "megablox", "triton")
# Rows, widths, and rows of each expert: experts without rows, one that has all, rows of none, and widths and sizes that
# no tile divides. Some tiles of rows have several experts, some experts several tiles.
CASES = {
    "some have none": (300, 72, 200, [0, 150, 0, 150, 0]),
    "the first has all": (256, 128, 64, [256, 0, 0]),
    "the last has all": (256, 64, 128, [0, 0, 256]),
    "rows of none": (512, 136, 72, [100, 28, 0, 130, 127]),
    "no rows": (128, 16, 16, [0, 0]),
}


def inputs(case: str, dtype=np.float32):
    """Returns x, w, y's gradient and the sizes. Rows that no expert has hold no numbers."""
    M, K, N, sizes = CASES[case]
    random = np.random.default_rng(0)
    x, w, dy = (random.normal(size=shape).astype(dtype) for shape in ((M, K), (len(sizes), K, N), (M, N)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return x, w, dy, np.array(sizes, np.int32)


def with_gradients(product):
    """Returns a function that gives y, dx and dw."""

    def all_three(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *pull(dy)

    return all_three


def result_and_gradients(product, x, w, dy, sizes) -> list[np.ndarray]:
    """Returns y, dx and dw, without the rows that are undefined."""
    y, dx, dw = (np.asarray(array) for array in jax.jit(with_gradients(product))(x, w, dy, sizes))
    assert {array.dtype for array in (y, dx, dw)} == {x.dtype}
    return [y[: sizes.sum()], dx[: sizes.sum()], dw]


def dense(x, w, dy, sizes) -> list[np.ndarray]:
    """Returns the same by all experts for all rows, masked, in float64."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    mask = (owners[:, None] == np.arange(len(sizes))).astype(np.float64)
    x, w, dy = (np.asarray(array, np.float64) for array in (x[: sizes.sum()], w, dy[: sizes.sum()]))
    y = np.einsum("me,mk,ekn->mn", mask, x, w, optimize=True)
    dx = np.einsum("me,mn,ekn->mk", mask, dy, w, optimize=True)
    return [y, dx, np.einsum("me,mk,mn->ekn", mask, x, dy, optimize=True)]


def assert_close(actual: Iterable[np.ndarray], expected: Iterable[np.ndarray], tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_the_results_and_gradients_of_all_experts_masked(kernel: str, case: str):
    arrays = inputs(case)
    actual = result_and_gradients(lambda *operands: product_by(kernel, *operands), *arrays)
    assert_close(actual, dense(*arrays), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_matrices_may_be_transposed(kernel: str):
    x, w, dy, sizes = inputs("rows of none")
    product = lambda x, w, sizes: product_by(kernel, x, w, sizes, None, None, True)
    y, dx, dw = result_and_gradients(product, x, np.ascontiguousarray(w.swapaxes(1, 2)), dy, sizes)
    assert_close((y, dx, dw.swapaxes(1, 2)), dense(x, w, dy, sizes), 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(kernel: str):
    arrays = inputs("rows of none", jnp.bfloat16)
    actual = result_and_gradients(lambda *operands: product_by(kernel, *operands), *arrays)
    for one, other in zip(actual, dense(*arrays), strict=True):
        assert np.mean(one == other.astype(jnp.bfloat16)) > 0.995


def test_triton_programs_touch_nothing_behind_their_arrays_and_no_row_of_none(monkeypatch: pytest.MonkeyPatch):
    """A GPU would read and write what lies there. The interpreter does not, so a tile that asks for it becomes NaN."""
    load, store = triton.load, triton.store

    def checked(tile: jax.Array, ref, mask: jax.Array | None) -> jax.Array:
        places = zip(ref.transforms[-1].indices, ref.ref.shape, strict=True)
        rows, columns = (
            place.start + jnp.arange(place.size) < size for place, size in places if isinstance(place, pl.Slice)
        )
        exists = rows[:, None] & columns
        asked = jnp.broadcast_to(True if mask is None else mask, exists.shape)
        return jnp.where(jnp.any(asked & ~exists), jnp.nan, tile)

    monkeypatch.setattr(triton, "load", lambda ref, mask, other: checked(load(ref, mask=mask, other=other), ref, mask))
    monkeypatch.setattr(triton, "store", lambda ref, tile, mask: store(ref, checked(tile, ref, mask), mask=mask))
    x, w, dy, sizes = inputs("rows of none")
    x, dy = np.nan_to_num(x), np.nan_to_num(dy)
    y, dx, dw = jax.jit(with_gradients(lambda *operands: product_by("triton", *operands)))(x, w, dy, sizes)
    assert_close((y[: sizes.sum()], dx[: sizes.sum()], dw), dense(x, w, dy, sizes), 1e-6)
    assert np.isnan(y[sizes.sum() :]).all()
    assert np.isnan(dx[sizes.sum() :]).all()


def test_on_a_cpu_each_device_of_a_mesh_has_its_own_rows():
    x, w, dy, sizes = inputs("some have none")
    rows, whole = PartitionSpec("fsdp"), PartitionSpec()
    product = jax.shard_map(grouped_product, in_specs=(rows, whole, rows), out_specs=rows, check_vma=False)
    twice = [np.concatenate([array, array]) for array in (x, dy, sizes)]
    with jax.set_mesh(mesh_of(fsdp=2)):
        place = lambda array, spec: jax.device_put(array, spec)
        pull = jax.vjp(lambda x, w: product(x, w, place(twice[2], rows)), place(twice[0], rows), place(w, whole))[1]
        dx, dw = pull(place(twice[1], rows))
    alone = dense(x, w, dy, sizes)
    assert_close((dx, dw), (np.concatenate([alone[1], alone[1]]), 2 * alone[2]), 1e-6)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("width", [64, 200, 768, 2048, 2880, 14336])
def test_the_cores_of_a_tpu_share_the_outputs_evenly(width: int, cores: int):
    tile = _tile(width, 1024, cores)
    assert tile <= 1024
    assert tile == width or tile % 128 == 0
    assert -(-width // tile) % cores == 0 or width <= 128


# --- Compiled for devices that are not here ---


def compiled(topology: str, E: int, M: int, K: int, N: int, dtype: str) -> list[Instruction]:
    """Returns the instructions of the product and its gradients on one device of a topology."""
    require({"v": "libtpu", "h": "jax_cuda13_plugin"}[topology[0]])
    devices = np.array(topology_devices(topology)[:1])
    mesh = Mesh(devices, ("fsdp",), axis_types=(AxisType.Explicit,))
    shapes = (((M, K), dtype), ((E, K, N), dtype), ((M, N), dtype), ((E,), "int32"))

    with jax.set_mesh(mesh), without_jax_cache():
        sharding = NamedSharding(mesh, PartitionSpec())
        arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
        all_three = with_gradients(grouped_product)
        function = jax.shard_map(all_three, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        text = jax.jit(function).lower(*arguments).compile().as_text()
    computations, _ = computations_of(text)
    return [instruction for computation in computations.values() for instruction in computation.values()]


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "h100:1x1"])
def test_a_compiled_program_has_three_kernels_and_nothing_else_of_their_size(topology: str):
    # Only arrays of experts × rows are multiples of 11 · 13. The others are too large to be moved closer to a core.
    E, M, K, N = 11, 13 * 4096, 5120, 3072
    instructions = compiled(topology, E, M, K, N, "bfloat16")
    assert [i for i in instructions if i.opcode in ("dot", "convolution") or i.is_product] == []
    arrays = [array for i in instructions for array in i.results]
    assert [array for array in arrays if array.elements and array.elements % (E * M) == 0] == []
    large = [i for i in instructions if i.opcode != "parameter" and any(a.elements >= M * N for a in i.results)]
    kernels = [i for i in large if i.opcode == "custom-call"]
    assert {i.opcode for i in large} <= {"custom-call", "tuple"}
    names = ["grouped_rows", "grouped_rows", "grouped_weights"]
    assert sorted(name for i in kernels for name in set(names) if name in i.source) == names
    assert sorted(i.results[0].dims for i in kernels) == [(E, K, N), (M, N), (M, K)]


@pytest.mark.parametrize(("E", "dtype"), [(3, "bfloat16"), (3, "float32"), (2, "float32")])
def test_the_largest_tiles_fit_the_memory_of_a_tpus_kernel(E: int, dtype: str):
    """Tiles have 256 rows for three experts and 512 for two, for which the test above has bfloat16."""
    kernels = [i for i in compiled("v5e:1x1", E, 4096, 2048, 1024, dtype) if i.target == "tpu_custom_call"]
    assert len(kernels) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_widths_that_no_tile_divides_compile_for_a_gpu(dtype: str):
    kernels = [i for i in compiled("h100:1x1", 3, 300, 720, 200, dtype) if "triton" in i.target]
    assert len(kernels) == 3
