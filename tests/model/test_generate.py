"""Generation: the cache against the full pass, sampling, the end, and sliding past the context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig
from model.decoder import Decoder
from model.generate import empty_cache, generate, next_logits, sample
from model.sharding import WHOLE
from tests.small import VOCAB_SIZE, small_batch, small_model, small_weights

NONE = -1  # an end that no token is


def full_logits(config: ModelConfig, weights: dict, tokens: list[int]) -> np.ndarray:
    decoder = Decoder(config, weights)
    x = decoder(jnp.array([tokens]), jnp.arange(len(tokens))[None], jnp.ones((1, len(tokens)), jnp.int32))
    return np.asarray(decoder.logits(x)[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_logits_from_the_cache_are_those_of_the_full_pass(dtype: str, tolerance: float):
    config = small_model(compute_dtype=dtype)
    weights, tokens = small_weights(config), small_batch(1)["tokens"][0].tolist()
    expected = full_logits(config, weights, tokens)
    cache, start = empty_cache(config, 1, 16), 0
    for count, padding in ((5, 3), (1, 0), (2, 1), (8, 0)):
        part = tokens[start : start + count] + [0] * padding
        place = jnp.array([start, count - 1])
        found, cache = next_logits(config, weights, jnp.array([part]), place, cache, WHOLE)
        start += count
        np.testing.assert_allclose(found[0, :VOCAB_SIZE], expected[start - 1, :VOCAB_SIZE], atol=tolerance)


def test_greedy_generation_follows_the_full_pass_and_slides_past_the_context():
    config = small_model()
    weights, context = small_weights(config), 12
    prompt = small_batch(1)["tokens"][0][:7].tolist()
    found = list(generate(config, weights, prompt, context=context, eos_id=NONE, max_new_tokens=30, temperature=0.0))
    seen, expected = list(prompt), []
    for _ in range(30):
        expected.append(int(full_logits(config, weights, seen)[-1].argmax()))
        seen.append(expected[-1])
        if len(seen) == context + 1:
            # Full: on from the newer half, with what was just drawn.
            seen = seen[-(context // 2) :]
    assert found == expected


def test_it_ends_before_eos_and_after_the_limit():
    config = small_model()
    weights = small_weights(config)
    arguments = {"context": 16, "max_new_tokens": 6, "temperature": 0.0}
    tokens = list(generate(config, weights, [1, 2, 3], eos_id=NONE, **arguments))
    assert len(tokens) == 6
    end = tokens[3]
    assert list(generate(config, weights, [1, 2, 3], eos_id=end, **arguments)) == tokens[: tokens.index(end)]


def test_an_empty_prompt_begins_a_document_and_a_long_one_keeps_its_end():
    config = small_model()
    weights = small_weights(config)
    arguments = {"context": 8, "max_new_tokens": 3, "temperature": 0.0}
    assert list(generate(config, weights, [], eos_id=5, **arguments)) == list(
        generate(config, weights, [5], eos_id=5, **arguments)
    )
    long = list(range(20))
    assert list(generate(config, weights, long, eos_id=NONE, **arguments)) == list(
        generate(config, weights, long[-8:], eos_id=NONE, **arguments)
    )


def test_a_seed_draws_the_same_tokens_again():
    config = small_model()
    weights = small_weights(config)
    draw = lambda seed: list(
        generate(config, weights, [1], context=16, eos_id=NONE, max_new_tokens=12, top_k=3, seed=seed)
    )
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_samples_have_the_probabilities_of_the_truncated_softmax():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
    count = 20_000
    drawn = np.asarray(sample(jnp.tile(logits, (count, 1)), jax.random.key(0), 3, 0.5))
    weights = np.array([0.5, 0.25, 0.15, 0.0]) ** 2
    frequencies = np.bincount(drawn, minlength=4) / count
    np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=0.015)
    assert frequencies[3] == 0
    assert int(sample(logits[None], jax.random.key(1), 0, 0.0)[0]) == 0
