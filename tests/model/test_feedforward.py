"""Floor 4: activations, computed in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.feedforward.dense import ACTIVATIONS, CLAMP, activate

ROUNDING = 2.0**-8  # of bfloat16


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_in_bfloat16_is_rounded_once_and_keeps_its_inputs_alone(activation: str, is_gated: bool):
    *inputs, slope = jnp.asarray(np.random.default_rng(0).normal(size=(2 + is_gated, 1000)), jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]

    def plain(x: jax.Array, up: jax.Array | float = 1.0) -> jax.Array:
        gated = jnp.clip(up, -CLAMP, CLAMP) + 1 if activation == "clamped_swiglu" and is_gated else up
        return ACTIVATIONS[activation](x) * gated

    for one, other in zip(
        (activate(activation, *inputs), *jax.vjp(partial(activate, activation), *inputs)[1](slope)),
        (plain(*exact), *jax.vjp(plain, *exact)[1](slope.astype(jnp.float32))),
        strict=True,
    ):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=ROUNDING, atol=1e-6)
    backward = jax.eval_shape(lambda *inputs: jax.vjp(partial(activate, activation), *inputs)[1], *inputs)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(backward)] == [((1000,), jnp.bfloat16)] * len(inputs)
