"""What goes to memory keeps its value and its gradient."""

import jax
import jax.numpy as jnp
import pytest

from model.memory import gradient_in_memory, result_in_memory


@pytest.mark.parametrize("in_memory", [result_in_memory, gradient_in_memory])
def test_values_and_gradients_stay_the_same(in_memory):
    x, slope = jnp.array([1.5, -2.0]), jnp.array([0.25, 3.0])
    y, pull = jax.vjp(in_memory, x)
    assert (y == x).all()
    assert (pull(slope)[0] == slope).all()
