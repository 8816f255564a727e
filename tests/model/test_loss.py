"""The chunked loss against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.loss import predictions, summed_losses, token_losses
from model.unembedding import logits

B, T, D, V, VOCAB = 3, 12, 8, 40, 37


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    x, matrix = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    return x, matrix, jax.random.randint(keys[2], (B, T), 0, VOCAB), jax.random.normal(keys[3], (B, T))


def model(chunk: int, vocab_size: int = VOCAB, **changes: float) -> ModelConfig:
    return ModelConfig(vocab_size=vocab_size, loss_chunk=chunk, **changes)


def plain(x: jax.Array, matrix: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -log p(target) by `log_softmax`."""
    scores = jax.nn.log_softmax(x @ matrix[:, :VOCAB])
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


def assert_near(actual: object, expected: object) -> None:
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 12, 15, 36, 300])
def test_values_and_gradients_are_those_of_log_softmax(chunk: int):
    x, matrix, targets, weights = example()

    def chunked(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return 3 * summed_losses(x, matrix, targets, weights, model(chunk)).objective

    def whole(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return 3 * jnp.sum(weights * plain(x, matrix, targets))

    assert_near(*(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, matrix) for loss in (chunked, whole)))
    each = token_losses(x, matrix, targets, model(chunk))
    assert_near(each.cross_entropy, plain(x, matrix, targets))
    assert_near(each.objective, each.cross_entropy)


@pytest.mark.parametrize("chunk", [1, 15, 300])
def test_predictions_are_log_softmax_and_argmax_and_of_equal_tokens_the_first(chunk: int):
    x, matrix, _, _ = example()
    # Whole numbers, so that scores are equal and exact.
    x, matrix = jnp.round(x), jnp.round(matrix).at[:, VOCAB:].set(100.0)
    first = jnp.argmax(x @ matrix[:, :VOCAB], axis=-1)
    likeliest = (x @ matrix[:, :VOCAB]) == jnp.max(x @ matrix[:, :VOCAB], axis=-1, keepdims=True)
    last = VOCAB - 1 - jnp.argmax(likeliest[..., ::-1], axis=-1)
    assert (first != last).any()
    for targets in (first, last):
        log_p, is_first = predictions(x, matrix, targets, model(chunk))
        assert_near(log_p, -plain(x, matrix, targets))
        np.testing.assert_array_equal(is_first, targets == first)


def test_smoothing_and_z_loss_have_the_gradients_of_their_definitions():
    x, matrix, targets, weights = example()
    config = model(15, label_smoothing=0.1, z_loss=0.01)

    def chunked(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return summed_losses(x, matrix, targets, weights, config).objective

    def whole(x: jax.Array, matrix: jax.Array) -> jax.Array:
        scores = x @ matrix[:, :VOCAB]
        log_sum = jax.nn.logsumexp(scores, axis=-1)
        mean = jnp.mean(scores, axis=-1) - log_sum
        return jnp.sum(weights * (0.9 * plain(x, matrix, targets) - 0.1 * mean + 0.01 * log_sum**2))

    assert_near(*(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, matrix) for loss in (chunked, whole)))
    cross_entropy = summed_losses(x, matrix, targets, weights, config).cross_entropy
    assert_near(cross_entropy, jnp.sum(weights * plain(x, matrix, targets)))
    # The values are the same where gradients are computed, too.
    (objective, other), _ = jax.value_and_grad(
        lambda x: summed_losses(x, matrix, targets, weights, config), has_aux=True
    )(x)
    assert_near((objective, other), (whole(x, matrix), cross_entropy))


def test_a_large_vocabulary_fits_in_memory():
    B, T, D, vocab_size = 64, 1024, 64, 200_000
    chunk = ModelConfig().resolved(vocab_size).loss_chunk
    assert chunk is not None

    def loss(x: jax.Array, matrix: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        return summed_losses(x, matrix, targets, weights, model(chunk, vocab_size)).objective

    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    matrix = jax.ShapeDtypeStruct((D, vocab_size + 64), jnp.bfloat16)
    targets, weights = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.float32))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, matrix, targets, weights).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    # The matrix's gradient in float32, and less than six arrays of a chunk's logits; those of the batch are 52 GB.
    assert memory < 4 * D * vocab_size + 6 * 4 * chunk * vocab_size < 4 * B * T * vocab_size / 6
    assert memory > 4 * chunk * vocab_size / 2


def test_scaled_and_capped_logits_have_the_gradients_of_their_formula():
    x, matrix, targets, weights = example()

    def by_formula(x: jax.Array, matrix: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(2.0 * jnp.tanh(0.5 * (x @ matrix[:, :VOCAB]) / 2.0))
        return -jnp.sum(jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0] * weights)

    config = model(4, logit_multiplier=0.5, logit_softcap=2.0)
    in_chunks = lambda x, matrix: summed_losses(x, matrix, targets, weights, config).objective
    found, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)))(x, matrix) for loss in (in_chunks, by_formula))
    assert_near(found, expected)


def test_padding_of_the_vocabulary_is_never_predicted_nor_trained():
    x, matrix, targets, weights = example()
    loss = lambda matrix: summed_losses(x, matrix, targets, weights, model(4, label_smoothing=0.1)).objective
    gradient = jax.grad(loss)(matrix.at[:, VOCAB:].set(100.0))
    np.testing.assert_array_equal(gradient[:, VOCAB:], 0.0)
    assert jax.nn.softmax(logits(x, matrix, model(4)))[..., VOCAB:].max() == 0.0


def test_the_logits_of_a_whole_batch_never_exist_and_those_of_a_chunk_once():
    x, matrix, targets, weights = example()

    def loss(x: jax.Array, matrix: jax.Array) -> jax.Array:
        return summed_losses(x, matrix, targets, weights, model(3 * B)).objective

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, matrix))
    assert f"[{B},3,{V}]" in program
    assert f"[{B},{T},{V}]" not in program
    assert program.count("dot_general") == 3


def test_a_length_that_no_chunk_divides_takes_few_chunks():
    x, matrix, targets, _ = example()
    x, targets = x[:, :11], targets[:, :11]
    program = str(jax.make_jaxpr(lambda x: token_losses(x, matrix, targets, model(10 * B)))(x))
    assert f"[{B},6,{V}]" in program
    assert f"[{B},1,{V}]" not in program
