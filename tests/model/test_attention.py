"""Floor 3 against its definition in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import Attention, attend, attention_weights, causal_mask
from model.decoder import Decoder
from model.kernels import attention_over
from model.position import rope_rotation, rotate
from model.sharding import UNSHARDED
from tests import theirs
from tests.peers import require
from tests.small import small_model, small_weights


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (None, 0.7), (3, 1.5)])
def test_attend_is_the_definition_with_heads_sharing_keys(window: int | None, softcap: float | None):
    random = np.random.default_rng(0)
    B, H, K, T, C = 2, 6, 2, 5, 4
    q, k, v = (random.normal(size=(B, n, T, C)).astype(np.float32) for n in (H, K, K))
    segment_ids = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    mask = causal_mask(jnp.array(segment_ids), window)
    actual = np.asarray(attend(jnp.array(q), jnp.array(k), jnp.array(v), mask, softcap))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                first = 0 if window is None else max(t + 1 - window, 0)
                seen = [s for s in range(first, t + 1) if segment_ids[b, s] == segment_ids[b, t]]
                shared = h // (H // K)
                scores = np.array([q[b, h, t] @ k[b, shared, s] for s in seen]) / np.sqrt(C)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores) / np.exp(scores).sum()
                expected = sum(w * v[b, shared, s] for w, s in zip(weights, seen, strict=True))
                np.testing.assert_allclose(actual[b, h, t], expected, atol=1e-6)


def test_the_module_projects_rotates_and_attends():
    config = small_model()
    weights = {name: array[0] for name, array in small_weights(config)["blocks"]["attention"].items()}
    x = jnp.array(np.random.default_rng(1).normal(size=(2, 7, config.model_dim)), jnp.float32)
    positions, segment_ids = jnp.tile(jnp.arange(7), (2, 1)), jnp.ones((2, 7), jnp.int32)
    angles, mask = rope_rotation(config, positions), causal_mask(segment_ids)
    actual = Attention(config, weights, UNSHARDED)(x, angles, attention_over(config, UNSHARDED, segment_ids, None))
    query, key, value = (jnp.einsum("btd,dhc->bhtc", x, weights[name]) for name in ("query", "key", "value"))
    mixed = attend(rotate(query, angles), rotate(key, angles), value, mask)
    np.testing.assert_allclose(actual, jnp.einsum("bhtc,hcd->btd", mixed, weights["output"]), atol=1e-6)


def test_each_heads_output_has_a_gate_and_values_have_what_the_token_adds():
    config = small_model(attention_gate=True)
    weights = {name: array[0] for name, array in small_weights(config)["blocks"]["attention"].items()}
    random = np.random.default_rng(1)
    x = jnp.asarray(random.normal(size=(2, 7, config.model_dim)), jnp.float32)
    added = jnp.asarray(random.normal(size=(2, 2, 7, 8)), jnp.float32)
    ids = jnp.ones((2, 7), jnp.int32)
    attention = attention_over(config, UNSHARDED, ids, None)
    actual = Attention(config, weights, UNSHARDED)(x, None, attention, value_embedding=lambda x: added + 0 * x[0, 0, 0])
    query, key, value = (jnp.einsum("btd,dhc->bhtc", x, weights[name]) for name in ("query", "key", "value"))
    gates = 1 / (1 + np.exp(-np.einsum("btd,dh->bht", x, weights["head_gate"])))
    assert np.ptp(gates) > 0.5
    mixed = attend(query, key, value + added, causal_mask(ids)) * gates[..., None]
    np.testing.assert_allclose(actual, jnp.einsum("bhtc,hcd->btd", mixed, weights["output"]), atol=1e-5)


def test_a_sink_takes_its_share_of_the_weights_and_adds_no_value():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, heads, 5, 8)), jnp.float32) for heads in (4, 2, 2))
    mask, sinks = causal_mask(jnp.ones((1, 5), jnp.int32)), jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    with_key = jnp.einsum("bhtc,bhsc->bhts", q, jnp.repeat(k, 2, axis=1)) / np.sqrt(8)
    with_key = jnp.where(mask, with_key, -jnp.inf)
    joined = jnp.concatenate([with_key, jnp.broadcast_to(sinks[None, :, None, None], (1, 4, 5, 1))], axis=-1)
    weights = jax.nn.softmax(joined, axis=-1)[..., :-1]
    expected = jnp.einsum("bhts,bhsc->bhtc", weights, jnp.repeat(v, 2, axis=1))
    np.testing.assert_allclose(attend(q, k, v, mask, sink_H=sinks), expected, atol=1e-6)
    np.testing.assert_allclose(attention_weights(q, k, mask, sink_H=sinks), weights, atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, mask, sink_H=sinks + 200), 0.0, atol=1e-6)
    gradient = jax.grad(lambda sinks: jnp.sum(attend(q, k, v, mask, sink_H=sinks)))(sinks + 200)
    assert np.isfinite(gradient).all()


def test_scores_and_softmax_are_float32_under_bfloat16():
    ones = jnp.ones((1, 1, 300, 2), jnp.bfloat16)
    # 300 equal weights sum to one only where the softmax is not rounded to 8 bits.
    average = attend(ones, ones, ones, causal_mask(jnp.ones((1, 300), jnp.int32)))
    np.testing.assert_allclose(average.astype(jnp.float32), 1.0, atol=4e-3)


def test_normed_queries_and_keys_have_the_length_of_their_scales():
    config = small_model(qk_norm=True)
    weights = jax.tree.map(lambda x: x[0], small_weights(config)["blocks"]["attention"])
    x = jnp.array(np.random.default_rng(1).normal(size=(2, 7, config.model_dim)), jnp.float32)
    attention = attention_over(config, UNSHARDED, jnp.ones((2, 7), jnp.int32), None)
    arguments = rope_rotation(config, jnp.tile(jnp.arange(7), (2, 1))), attention
    once = Attention(config, weights, UNSHARDED)(x, *arguments)
    # Longer queries and keys change nothing, longer scales do.
    for name in ("query", "key"):
        weights[name] = 10 * weights[name]
    np.testing.assert_allclose(Attention(config, weights, UNSHARDED)(x, *arguments), once, atol=1e-3)
    weights["query_norm"]["scale"] = 10 * weights["query_norm"]["scale"]
    assert np.abs(Attention(config, weights, UNSHARDED)(x, *arguments) - once).max() > 1e-2


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (3, 1.5)])
def test_attention_weights_sum_to_one_and_have_the_mask_and_the_result_of_attend(
    window: int | None, softcap: float | None
):
    random = np.random.default_rng(0)
    B, H, K, T, C = 2, 6, 2, 7, 4
    q, k, v = (jnp.array(random.normal(size=(B, n, T, C)), jnp.float32) for n in (H, K, K))
    mask = causal_mask(jnp.array([[1, 1, 1, 2, 2, 2, 2], [1] * 7]), window)
    weights = attention_weights(q, k, mask, softcap)
    assert weights.shape == (B, H, T, T)
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(mask, weights.shape))
    mixed = jnp.einsum("bhts,bhsc->bhtc", weights, jnp.repeat(v, H // K, axis=1))
    np.testing.assert_allclose(mixed, attend(q, k, v, mask, softcap), atol=1e-6)


@pytest.mark.parametrize("name", theirs.MODELS)
def test_transformers_gives_the_same_weights_for_every_layer_and_head(name: str):
    torch = require("torch")
    config = theirs.MODELS[name]
    weights, T = small_weights(config), 16
    tokens = np.random.default_rng(2).integers(0, 300, (2, T), dtype=np.int32)
    model, _ = theirs.load(name, weights)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.long), output_attentions=True).attentions
    positions, one = jnp.tile(jnp.arange(T), (2, 1)), jnp.ones((2, T), jnp.int32)
    actual = jax.jit(lambda weights: Decoder(config, weights).attention_weights(tokens, positions, one))(weights)
    assert actual.shape == (config.num_layers, 2, config.num_heads, T, T)
    assert np.abs(np.asarray(actual) - np.stack([layer.numpy() for layer in expected])).max() <= 1e-5
