"""Floor 1: the look-up, its scale, the gradient of a frequent token, smear, and the tables of value embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.context_parallel import previous_tokens, zigzag_order
from model.embedding import Embedding, ValueEmbedding, embedding_lookup
from model.sharding import UNSHARDED
from tests.small import mesh_of, small_batch, small_model, small_weights
from train.devices.rules import TRAINING


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


@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_token_before_is_that_of_the_row_and_the_document_wherever_positions_are(context: int):
    batch = small_batch(3)
    tokens, ids = batch["tokens"], batch["segment_ids"]
    expected = np.full_like(tokens, -1)
    for b, t in np.ndindex(tokens.shape):
        if t and ids[b, t] == ids[b, t - 1]:
            expected[b, t] = tokens[b, t - 1]
    assert (expected == -1).sum() > 3
    with jax.set_mesh(mesh_of(context=context)):
        order = zigzag_order(tokens.shape[1], TRAINING)
        actual = previous_tokens(jnp.asarray(tokens[:, order]), jnp.asarray(ids[:, order]), TRAINING)
        np.testing.assert_array_equal(actual, expected[:, order])


@pytest.mark.parametrize("scaled", [False, True])
def test_smear_adds_a_gated_part_of_the_vector_before(scaled: bool):
    config = small_model(smear=True, scale_embeddings=scaled)
    weights = small_weights(config)["embedding"]
    tokens, previous = jnp.array([[3, 7, 5]]), jnp.array([[-1, 3, 7]])
    e = np.asarray(weights["table"], np.float64) * (np.sqrt(32) if scaled else 1)
    expected = [e[3]]
    for token, before in ((7, 3), (5, 7)):
        gate = 1 / (1 + np.exp(-e[token] @ np.asarray(weights["smear_gate"])))
        expected.append(e[token] + float(weights["smear"]) * gate * e[before])
    assert np.abs(expected[1] - e[7]).max() > 0.01
    np.testing.assert_allclose(Embedding(config, weights, UNSHARDED)(tokens, previous)[0], expected, atol=1e-5)


def test_a_value_embedding_is_the_tokens_row_times_twice_a_sigmoid_for_each_head():
    config = small_model(value_embedding_every=1)
    weights = jax.tree.map(lambda w: np.asarray(w[0]), small_weights(config)["blocks"]["value_embedding"])
    tokens, x = np.array([[3, 7, 3]]), np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    actual = ValueEmbedding(config, jax.tree.map(jnp.asarray, weights), UNSHARDED)(jnp.asarray(tokens), jnp.asarray(x))
    for t, token in enumerate(tokens[0]):
        for head in range(2):
            gate = 2 / (1 + np.exp(-x[0, t] @ weights["value_gate"][:, head]))
            expected = gate * weights["table"][token, 8 * head : 8 * head + 8]
            np.testing.assert_allclose(actual[0, head, t], expected, atol=1e-6)
