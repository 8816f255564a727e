"""Floor 1: the look-up, its scale, and the gradient of a frequent token."""

import jax
import jax.numpy as jnp
import numpy as np

from model.embedding import Embedding, embedding_lookup
from model.sharding import UNSHARDED
from tests.small import small_model


def test_a_token_becomes_its_row_scaled_where_asked():
    table, tokens = jnp.array(np.random.default_rng(0).normal(size=(5, 32)), jnp.float32), jnp.array([[3, 0], [4, 3]])
    plain, scaled = small_model(), small_model(scale_embeddings=True)
    np.testing.assert_array_equal(Embedding(plain, {"table": table}, UNSHARDED)(tokens), table[tokens])
    actual = Embedding(scaled, {"table": table}, UNSHARDED)(tokens)
    np.testing.assert_allclose(actual, table[tokens] * np.sqrt(32), rtol=1e-6)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    tokens = jnp.array([[1] * 3000 + [0]])
    loss = lambda table: jnp.sum(embedding_lookup(table, tokens, UNSHARDED).astype(jnp.float32) * 0.01)
    gradient = jax.grad(loss)(jnp.zeros((3, 4), jnp.bfloat16)).astype(jnp.float32)
    # In bfloat16 the sum would stay at 2.56, where 0.01 is less than half of its last place.
    np.testing.assert_allclose(gradient, [[0.01] * 4, [30.0] * 4, [0.0] * 4], rtol=5e-3)
