"""Dropout: its rate and scale, and its masks, one for each row."""

import jax
import jax.numpy as jnp
import numpy as np

from model.decoder import Decoder
from model.dropout import dropout, fold_keys, row_keys
from tests.small import small_batch, small_model, small_weights


def test_components_are_dropped_at_the_rate_and_the_mean_stays():
    keys_B = row_keys(0, jnp.int32(5), jnp.arange(50))
    x = dropout(jnp.ones((50, 40, 30)), 0.3, keys_B)
    assert set(np.unique(x)) == {np.float32(0), np.float32(1) / np.float32(0.7)}
    assert abs(float(jnp.mean(x)) - 1) < 0.01
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, keys_B) is x


def test_a_mask_depends_on_seed_step_row_and_place_alone():
    x = jnp.ones((6, 8, 8))
    mask = lambda seed, step, rows, place: np.asarray(
        dropout(x[: len(rows)], 0.5, fold_keys(row_keys(seed, jnp.int32(step), jnp.array(rows)), place))
    )
    all_rows = mask(0, 3, range(6), 1)
    np.testing.assert_array_equal(mask(0, 3, [4, 1], 1), all_rows[[4, 1]])
    assert len({mask(*arguments)[0].tobytes() for arguments in ((0, 3, [0], 1), (1, 3, [0], 1), (0, 4, [0], 1),
                                                                (0, 3, [1], 1), (0, 3, [0], 2))}) == 5  # fmt: skip


def test_each_rate_acts_in_training_and_none_without_keys():
    batch = small_batch(3)
    arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    keys_B = row_keys(0, jnp.int32(0), jnp.arange(3))
    weights = small_weights(small_model())  # rates have none
    pass_with = lambda config: jax.jit(lambda *keys_B: Decoder(config, weights)(*arguments, *keys_B))
    expected = pass_with(small_model())()
    for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
        decoder = pass_with(small_model(**{name: 0.2}))
        np.testing.assert_array_equal(decoder(), expected)
        assert np.abs(decoder(keys_B) - expected).max() > 0.1


def test_layers_drop_different_components():
    config = small_model(num_layers=2, residual_dropout=0.5)
    weights = jax.tree.map(lambda x: x, small_weights(config))
    # Both layers have the same weights, so that only their masks differ.
    weights["blocks"] = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), weights["blocks"])
    batch, keys_B = small_batch(2), row_keys(0, jnp.int32(0), jnp.arange(2))
    arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    swapped = dict(weights, blocks=jax.tree.map(lambda x: x[::-1], weights["blocks"]))
    decoder = jax.jit(lambda config, weights: Decoder(config, weights)(*arguments, keys_B), static_argnums=0)
    one = decoder(config, weights)
    np.testing.assert_array_equal(one, decoder(config, swapped))
    first = small_model(num_layers=1, residual_dropout=0.5)
    only = decoder(first, dict(weights, blocks=jax.tree.map(lambda x: x[:1], weights["blocks"])))
    assert np.abs(only - one).max() > 0.1
