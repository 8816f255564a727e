"""The chunked loss against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.loss import token_log_probabilities
from model.sharding import WHOLE
from model.unembedding import logits

B, T, D, V, VOCAB = 3, 12, 8, 40, 37


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    x, matrix = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    return x, matrix, jax.random.randint(keys[2], (B, T), 0, VOCAB), jax.random.normal(keys[3], (B, T))


def plain(x: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
    scores = jax.nn.log_softmax(x @ matrix[:, :VOCAB])
    return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 12, 15, 36, 300])
def test_values_and_gradients_are_those_of_log_softmax(chunk: int):
    x, matrix, targets, weights = example()

    def chunked(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.sum(weights * token_log_probabilities(x, matrix, targets, VOCAB, chunk, WHOLE).target)

    def whole(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.sum(weights * plain(x, matrix, targets))

    found, expected = jax.value_and_grad(chunked, (0, 1))(x, matrix), jax.value_and_grad(whole, (0, 1))(x, matrix)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_smoothing_and_z_loss_have_the_gradients_of_their_definitions():
    x, matrix, targets, weights = example()

    def objective(log_p_target: jax.Array, log_p_mean: jax.Array, log_sum: jax.Array) -> jax.Array:
        return jnp.sum(weights * (-0.9 * log_p_target - 0.1 * log_p_mean + 0.01 * log_sum**2))

    def chunked(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return objective(*token_log_probabilities(x, matrix, targets, VOCAB, 15, WHOLE))

    def whole(x: jax.Array, matrix: jax.Array) -> jax.Array:
        scores = x @ matrix[:, :VOCAB]
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        return objective(plain(x, matrix, targets), jnp.mean(scores, axis=-1) - log_sum, log_sum)

    found, expected = jax.value_and_grad(chunked, (0, 1))(x, matrix), jax.value_and_grad(whole, (0, 1))(x, matrix)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_a_large_vocabulary_fits_beside_what_must_be_there():
    B, T, D, vocab_size = 16, 1024, 64, 200_000
    chunk = ModelConfig().resolved(vocab_size).loss_chunk
    assert chunk is not None

    def loss(x: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
        return -jnp.sum(token_log_probabilities(x, matrix, targets, vocab_size, chunk, WHOLE).target)

    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    matrix = jax.ShapeDtypeStruct((D, vocab_size + 64), jnp.bfloat16)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, matrix, jax.ShapeDtypeStruct((B, T), jnp.int32)).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    # The matrix's gradient in float32, and less than six arrays of a chunk's logits; those of the batch are 13 GB.
    assert memory < 4 * D * vocab_size + 6 * 4 * chunk * vocab_size < 4 * B * T * vocab_size / 6
    assert memory > 4 * chunk * vocab_size / 2


def test_padding_of_the_vocabulary_is_never_predicted_nor_trained():
    x, matrix, targets, _ = example()
    loss = lambda matrix: jnp.sum(token_log_probabilities(x, matrix, targets, VOCAB, 4, WHOLE).target)
    gradient = jax.grad(loss)(matrix.at[:, VOCAB:].set(100.0))
    np.testing.assert_array_equal(gradient[:, VOCAB:], 0.0)
    assert jax.nn.softmax(logits(x, matrix, VOCAB))[..., VOCAB:].max() == 0.0


def test_the_logits_of_a_whole_batch_never_exist():
    x, matrix, targets, _ = example()

    def loss(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.sum(token_log_probabilities(x, matrix, targets, VOCAB, 3 * B, WHOLE).target)

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, matrix))
    assert f"[{B},3,{V}]" in program
    assert f"[{B},{T},{V}]" not in program


def test_a_length_that_no_chunk_divides_takes_few_chunks():
    x, matrix, targets, _ = example()
    x, targets = x[:, :11], targets[:, :11]
    program = str(jax.make_jaxpr(lambda x: token_log_probabilities(x, matrix, targets, VOCAB, 10 * B, WHOLE).target)(x))
    assert f"[{B},6,{V}]" in program
    assert f"[{B},1,{V}]" not in program
