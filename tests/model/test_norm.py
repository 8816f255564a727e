"""Norms: their formulas, in float32 whatever the dtype of what they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

from model.norm import stack_norm
from tests.small import small_model

random = np.random.default_rng(0)
SCALE, BIAS = (random.normal(1, 0.2, 512).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_norms_are_computed_in_float32_and_rounded_once(name: str):
    x = (3 + random.normal(size=(4, 512))).astype(jnp.bfloat16)
    norm = stack_norm(small_model(norm=name), {"scale": SCALE} | ({"bias": BIAS} if name == "layernorm" else {}))
    in_float32 = norm(jnp.asarray(x, jnp.float32))
    wide = x.astype(np.float64)
    if name == "layernorm":
        wide -= wide.mean(-1, keepdims=True)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * SCALE + BIAS * (name == "layernorm")
    np.testing.assert_allclose(in_float32, expected, rtol=1e-5, atol=1e-5)
    actual = norm(jnp.asarray(x))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, in_float32.astype(jnp.bfloat16))
