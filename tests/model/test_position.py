"""Floor 2: the rotary embedding."""

import jax.numpy as jnp
import numpy as np

from model.position import rotate, rotation
from tests.small import small_model


def test_a_product_of_query_and_key_depends_on_their_distance_alone():
    config = small_model(head_dim=16)
    q, k = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)

    def score(at: int, other: int) -> float:
        angles = rotation(config, jnp.array([[at, other]]))
        turned = rotate(jnp.array([q, k])[None, None], angles)[0, 0]
        return float(turned[0] @ turned[1])

    for distance in (0, 1, 17):
        assert np.isclose(score(distance, 0), score(200 + distance, 200), atol=1e-4)
    assert not np.isclose(score(1, 0), score(5, 0), atol=1e-2)


def test_position_zero_turns_nothing_and_lengths_stay():
    config = small_model(head_dim=8)
    x = jnp.array(np.random.default_rng(1).normal(size=(1, 2, 3, 8)), jnp.float32)
    turned = rotate(x, rotation(config, jnp.array([[0, 5, 900]])))
    np.testing.assert_array_equal(turned[:, :, 0], x[:, :, 0])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_pair_i_turns_by_position_over_base_to_the_2i_over_width():
    config = small_model(head_dim=4, rope_base=100.0)
    turned = rotate(jnp.array([[[[1.0, 1.0, 0.0, 0.0]]]]), rotation(config, jnp.array([[3]])))
    expected = [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-6)
