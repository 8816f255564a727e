"""The decoder's parts for XLA's CPU backend: products of columns, and in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cpu import column_product, int8_product, quantized

EQUATIONS = ("btd,hcd->bhtc", "bhtc,dhc->btd", "btd,fd->btf")
SIZES = {"b": 2, "t": 1, "d": 6, "h": 3, "c": 4, "f": 5}


def operands(equation: str, tokens: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    sizes = SIZES | {"t": tokens, "b": batch}
    random = np.random.default_rng(0)
    x_letters, weight_letters = equation.split("->")[0].split(",")
    draw = lambda letters: random.normal(0, 1, [sizes[letter] for letter in letters]).astype(np.float32)
    return draw(x_letters), draw(weight_letters)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize(("tokens", "batch"), [(1, 1), (1, 2), (40, 2)])
def test_a_product_of_columns_is_the_einsum(equation: str, tokens: int, batch: int):
    x, weight = operands(equation, tokens, batch)
    expected = np.einsum(equation, x, weight)
    np.testing.assert_allclose(column_product(equation, x, weight), expected, atol=1e-5)
    contracted = len(set(equation.split(",")[0]) - {"b", "t"} - set(equation.split("->")[1]))
    whole, scale = quantized(jnp.asarray(weight), contracted)
    assert whole.dtype == np.int8
    # Each of at most 12 products is off by half a step of both scales: 1/254 of the largest, which are at most 4.
    np.testing.assert_allclose(int8_product(equation, x, whole, scale), expected, atol=12 * 2 * 4 * 4 / 254)
    again = whole * scale.reshape(*scale.shape, *(1,) * contracted)
    np.testing.assert_allclose(again, weight, atol=np.abs(weight).max() / 253)


def test_products_in_8_bits_are_close_for_rows_and_columns_of_any_size():
    x, weight = operands("btd,fd->btf", 40)
    x, weight = np.repeat(x, 100, axis=2), np.repeat(weight, 100, axis=1)
    x *= np.geomspace(1e-3, 1e3, 40, dtype=np.float32)[:, None]
    weight *= np.array([0, 1e-3, 1, 1e3, 1e6], np.float32)[:, None]
    actual = int8_product("btd,fd->btf", x, *quantized(jnp.asarray(weight), 1))
    assert np.all(np.asarray(quantized(jnp.asarray(weight), 1)[1]) > 0)
    size = np.linalg.norm(x, axis=2)[:, :, None] * np.linalg.norm(weight, axis=1)
    assert np.all(np.abs(actual - np.einsum("btd,fd->btf", x, weight)) <= 0.01 * size)


def test_a_row_in_8_bits_is_the_same_to_the_last_bit_in_any_batch():
    x, weight = operands("btd,fd->btf", 40)
    whole, scale = quantized(jnp.asarray(weight), 1)
    together = int8_product("btd,fd->btf", x, whole, scale)
    alone = int8_product("btd,fd->btf", x[1:, 7:8], whole, scale)
    np.testing.assert_array_equal(alone[0, 0], together[1, 7])


def test_one_row_is_multiplied_as_two():
    x, weight = operands("btd,fd->btf", 1, batch=1)
    program = jax.jit(lambda x, weight: column_product("btd,fd->btf", x, weight)).lower(x, weight).as_text()
    [product] = [line for line in program.splitlines() if "dot_general" in line]
    assert product.endswith("tensor<5x2xf32>")
