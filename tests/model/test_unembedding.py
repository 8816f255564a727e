"""Logits: float32 sums, and no score for the padding of the vocabulary."""

import jax.numpy as jnp
import numpy as np

from model.unembedding import logits
from tests.small import small_model


def test_logits_of_bfloat16_are_summed_in_float32_and_the_padding_is_never_predicted():
    random = np.random.default_rng(0)
    x, matrix = (random.normal(size=shape).astype(jnp.bfloat16) for shape in ((2, 3, 512), (512, 128)))
    found = logits(jnp.asarray(x), jnp.asarray(matrix), small_model(vocab_size=100))
    assert found.dtype == jnp.float32
    expected = np.einsum("btd,dv->btv", x.astype(np.float64), matrix.astype(np.float64))
    np.testing.assert_allclose(found[..., :100], expected[..., :100], atol=1e-4)
    assert np.all(np.asarray(found[..., 100:]) == np.finfo(np.float32).min)
