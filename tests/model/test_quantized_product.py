"""Products of 8-bit numbers: how far they are from those of float32, alone and on a mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from model.product import product
from model.quantized_product import LEAST_EXPONENT, quantize, quantized_product

KINDS = ("float8", "int8")
EQUATIONS = ("btd,df->btf", "btf,fd->btd", "btd,dhc->bhtc", "bhtc,hcd->btd", "btr,rhc->bhtc")
SIZES = dict(zip("btdfhcr", (3, 5, 64, 48, 2, 8, 16), strict=True))
# Half of the distance between neighbours: relative to a number, and to the scale where it is subnormal.
HALF = {"float8_e4m3fn": (2**-4, 2**-10), "int8": (0, 0.5)}
# Root mean squares of a product's relative error. A significand is at least 1, so its rounding is below a uniform error
# of ±2⁻⁴, which is 2⁻⁴/√3; int8's is the scale's 1/√12, with a largest magnitude of at most 4 deviations.
ERRORS = {"float8": 2**0.5 * 2**-4 / 3**0.5, "int8": 2**0.5 * 4 / 127 / 12**0.5}


def operands(equation: str, *, gradient: bool = False) -> list[jax.Array]:
    """Normal numbers whose rows have very different sizes."""
    x, weight, y = equation.replace("->", ",").split(",")
    arrays = []
    for seed, letters in enumerate((x, weight, y)[: 2 + gradient]):
        array = jax.random.normal(jax.random.key(seed), [SIZES[letter] for letter in letters])
        at_t = letters.find("t")
        shape = [-1 if axis == at_t else 1 for axis in range(len(letters))]
        arrays.append(array if at_t < 0 else array * (10.0 ** jnp.arange(-4, 1)).reshape(shape))
    return arrays


def relative(actual: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("dtype", HALF)
def test_a_number_is_rounded_by_half_the_distance_to_the_next_at_most(dtype: str):
    x = jax.random.normal(jax.random.key(0), (7, 300)) * 10.0 ** jnp.arange(-20, 15, 5)[:, None]
    numbers, scale = quantize(x, (1,), jnp.dtype(dtype))
    assert (numbers.dtype, scale.shape) == (dtype, (7, 1))
    of_number, of_scale = HALF[dtype]
    error = jnp.abs(numbers.astype(jnp.float32) * scale - x)
    assert (error <= 1.00001 * jnp.maximum(jnp.abs(x) * of_number, scale * of_scale)).all()
    largest = np.abs(np.asarray(numbers, np.float32)).max(axis=1)
    limit = 127 if dtype == "int8" else float(jnp.finfo(dtype).max)
    assert ((largest > limit / 2 * 0.9) & (largest <= limit)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_and_its_gradients_are_within_the_error_of_rounding(equation: str, kind: str):
    x, weight, gradient = operands(equation, gradient=True)

    @partial(jax.jit, static_argnums=0)
    def with_gradients(multiply: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(multiply, *operands)
        return y, *pull(gradient)

    exact, exact_dx, exact_dw = with_gradients(partial(product, equation), x, weight)
    y, dx, dw = with_gradients(partial(quantized_product, kind, equation), x, weight)
    assert (y.shape, y.dtype) == (exact.shape, exact.dtype)
    pairs = ((y, exact, equation.partition("->")[2]), (dx, exact_dx, equation.partition(",")[0]))
    for actual, expected, letters in pairs:
        # Row by row, as the smallest are as exact as the largest.
        rows = [partial(jnp.take, indices=t, axis=letters.index("t")) for t in range(SIZES["t"])]
        errors = [relative(row(actual), row(expected)) for row in rows]
        assert 0 < np.sqrt(np.mean(np.square(errors))) < ERRORS[kind], errors
        assert max(errors) < 1.5 * ERRORS[kind]
    np.testing.assert_array_equal(dw, exact_dw)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_the_result_is_that_of_float32_rounded(kind: str):
    x, weight = (array.astype(jnp.bfloat16) for array in operands("btd,df->btf"))
    y = quantized_product(kind, "btd,df->btf", x, weight)
    assert y.dtype == jnp.bfloat16
    in_float32 = quantized_product(kind, "btd,df->btf", x.astype(jnp.float32), weight.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), in_float32, rtol=2**-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_depends_on_no_other(kind: str):
    x, weight = operands("btd,df->btf")
    multiply = partial(quantized_product, kind, "btd,df->btf", weight=weight)
    np.testing.assert_allclose(multiply(x)[1:2, 2:4], multiply(x[1:2, 2:4]), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_value_that_is_not_finite_is_not_hidden(kind: str, value: float):
    x, weight = operands("btd,df->btf")
    y = quantized_product(kind, "btd,df->btf", x.at[0, 1, 2].set(value), weight)
    assert not jnp.isfinite(y[0, 1]).any()
    assert jnp.isfinite(y[1:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_smallest_numbers_give_no_nan(kind: str):
    x, weight = operands("btd,df->btf")
    for small in (0.0, 1e-38, 2.0 ** (LEAST_EXPONENT - 3)):
        assert jnp.abs(quantized_product(kind, "btd,df->btf", 0 * x + small, weight)).max() < 1e-25


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_that_a_mesh_shares_has_the_same_result_and_gradients(kind: str):
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(AxisType.Explicit,) * 3)
    rows, summed = ("data", "fsdp"), {"data", "fsdp"}
    multiply = partial(quantized_product, kind)

    def loss(x_BTD: jax.Array, up_DF: jax.Array, down_FD: jax.Array, shared: bool) -> jax.Array:
        unreduced = None
        if shared:
            x_BTD = jax.reshard(x_BTD, P(rows, None, None, reduced={"tensor"}))
            up_DF = jax.reshard(up_DF, P(None, "tensor", reduced=summed))
            down_FD = jax.reshard(down_FD, P("tensor", None, reduced=summed))
            unreduced = P(rows, None, None, unreduced={"tensor"})
        h_BTF = jax.nn.silu(multiply("btd,df->btf", x_BTD, up_DF))
        y_BTD = multiply("btf,fd->btd", h_BTF, down_FD, unreduced)
        y_BTD = jax.reshard(y_BTD, P(rows, "tensor", None)) if shared else y_BTD
        return jnp.sum(jnp.sin(y_BTD))

    shapes = ((8, 4, 16), (16, 32), (32, 16))
    arrays = [jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5 for i, shape in enumerate(shapes)]
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnames="shared")
    expected = gradients(*arrays, shared=False)
    with jax.set_mesh(mesh):
        specs = (P(rows), P("fsdp", "tensor"), P("tensor", "fsdp"))
        placed = [jax.device_put(array, spec) for array, spec in zip(arrays, specs, strict=True)]
        actual = gradients(*placed, shared=True)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
