"""Properties of every combination of floors: causality (C12), one pass for all prefixes, packing (C3), the cache."""

from typing import Any
from unittest import mock

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model import cpu_attention
from model.config import ModelConfig
from model.decoder import Decoder
from model.generation.decoder import CachedDecoder, empty_cache, extended_cache, newest_of
from model.generation.weights import decoding_weights
from settings import choices_of
from tests.small import VOCAB_SIZE, small_model, small_weights

T, PART, CALL = 12, 5, 3


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Draws any model of a few small layers."""
    drawn = lambda *values: draw(st.sampled_from(values))
    position = draw(st.sampled_from(choices_of(ModelConfig, "position")))
    scaling = draw(st.sampled_from(choices_of(ModelConfig, "rope_scaling"))) if position == "rope" else "none"
    factor, original = (1.0, None) if scaling == "none" else (4.0, 8)
    kinds = "FSN" if position == "rope" else "FS"
    pattern = draw(st.none() | st.text(kinds, min_size=1, max_size=3))
    window = drawn(1, 3) if "S" in (pattern or drawn("F", "S")) else None
    norm, activation = drawn(*choices_of(ModelConfig, "norm")), drawn(*choices_of(ModelConfig, "activation"))
    block = drawn(*choices_of(ModelConfig, "block"))
    qk_norm = draw(st.booleans())
    latent: dict[str, Any] = {}
    if position == "rope" and drawn(False, False, True):
        latent = {
            "kv_latent_dim": 8,
            "query_latent_dim": drawn(None, 6),
            "value_dim": drawn(None, 4),
            "num_kv_heads": 4,
        }
        latent |= {"head_dim": 6, "rope_dim": 2, "attention_bias": False, "attention_output_bias": None}
        qk_norm = False
    # The length of a row must not change what the model is.
    longrope = {"rope_short_divisors": "1.5", "rope_long_divisors": "3", "rope_dim": 2}
    latent |= longrope | {"rope_long": draw(st.booleans())} if scaling == "longrope" else {}
    model = {
        "num_layers": max(2, len(pattern or "")),
        "layer_pattern": pattern,
        "model_dim": 16,
        "num_heads": 4,
        "num_kv_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([None, 6])),
        "feedforward_dim": 24,
        "vocab_size": VOCAB_SIZE,
        "tie_embeddings": draw(st.booleans()),
        "scale_embeddings": draw(st.booleans()),
        "smear": draw(st.booleans()),
        "position": position,
        "max_positions": T if position == "learned" else None,
        "rope_scaling": scaling,
        "rope_factor": factor,
        "rope_original_context": original if scaling in ("llama3", "yarn", "longrope") else None,
        "rope_dim": drawn(None, 2) if position == "rope" else None,
        "window_rope_base": drawn(None, 300.0) if window and position == "rope" else None,
        "window_rope_scaling": drawn(True, False) if window and position == "rope" else True,
        "attention_bias": draw(st.booleans()),
        "attention_output_bias": drawn(None, False, True),
        "qk_norm": qk_norm,
        "qk_norm_over": drawn("head", "all_heads") if qk_norm else "head",
        "attention_scale": drawn(None, 0.3),
        "attention_sinks": draw(st.booleans()),
        "attention_gate": draw(st.booleans()),
        "value_embedding_every": None if "kv_latent_dim" in latent else drawn(None, 1, 2),
        "sliding_window": window,
        "attention_softcap": drawn(None, 2.0),
        "activation": activation,
        "gated": activation == "clamped_swiglu" or draw(st.booleans()),
        "feedforward_bias": draw(st.booleans()),
        "norm": norm,
        "norm_bias": norm == "rmsnorm" or draw(st.booleans()),
        "norm_offset": draw(st.booleans()),
        "norm_placement": "pre" if block != "sequential" else drawn(*choices_of(ModelConfig, "norm_placement")),
        "block": block,
        "embedding_multiplier": drawn(1.0, 3.0),
        "residual_multiplier": drawn(1.0, 0.3),
        "residual_scalars": draw(st.booleans()),
        "zero_init_outputs": draw(st.booleans()),
        "logit_multiplier": drawn(1.0, 0.3),
        "logit_softcap": drawn(None, 2.0),
        # Neither changes the result of a pass without dropout keys.
        "residual_dropout": draw(st.sampled_from([0.0, 0.5])),
        "remat_policy": draw(st.sampled_from(choices_of(ModelConfig, "remat_policy"))),
    }
    return small_model(**(model | latent | (mixtures(draw) if model["gated"] and drawn(False, False, True) else {})))


def mixtures(draw: st.DrawFn) -> dict[str, Any]:
    """Draws the fields of experts, in all layers but the first perhaps."""
    score = draw(st.sampled_from(choices_of(ModelConfig, "router_score")))
    groups = draw(st.sampled_from([1, 2]))
    shared = draw(st.sampled_from([None, 12]))
    return {
        "num_experts": 4,
        "experts_per_token": draw(st.sampled_from([1, 2])),
        "expert_dim": 12,
        "dense_layers": draw(st.sampled_from([0, 1])),
        "shared_expert_dim": shared,
        "shared_expert_gate": shared is not None and draw(st.booleans()),
        "router_score": score,
        "router_normalize": score == "softmax_of_chosen" or draw(st.booleans()),
        "router_bias": draw(st.booleans()),
        "router_groups": groups,
        "balance_bias": score != "softmax_of_chosen" and draw(st.booleans()),
    }


def log_probabilities(config: ModelConfig):
    """Returns compiled functions: log p [B, T, V] of whole rows, the same with a cache, and of one more token."""

    def of(decoder: Decoder | CachedDecoder, x_BTD: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(decoder.logits(x_BTD)[..., :VOCAB_SIZE])

    @jax.jit
    def at_once(weights: dict, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        decoder = Decoder(config, weights)
        return of(decoder, decoder(tokens, positions, segment_ids))

    @jax.jit
    def prefill(weights: dict, tokens: jax.Array) -> tuple[jax.Array, list]:
        decoder = CachedDecoder(config, weights)
        x_BTD, cache = decoder.prefill(tokens)
        return of(decoder, x_BTD), cache

    @jax.jit
    def step(weights: dict, token: jax.Array, *places_and_caches: Any) -> tuple[jax.Array, list]:
        decoder = CachedDecoder(config, weights)
        x_B1D, recent = decoder.step(token, *places_and_caches)
        return of(decoder, x_B1D), recent

    return at_once, prefill, step


@settings(max_examples=12)
@given(config=models(), seed=st.integers(0, 100))
def test_any_model_is_causal_trains_all_prefixes_at_once_packs_and_decodes_from_a_cache(config: ModelConfig, seed: int):
    assert config.problems() == []
    # So that attention in blocks has several.
    with mock.patch.object(cpu_attention, "LEAST_BLOCK", 4):
        check(config, seed)


def check(config: ModelConfig, seed: int) -> None:
    weights, (at_once, prefill, step) = small_weights(config, seed), log_probabilities(config)
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, T)
    positions, one = np.tile(np.arange(T), (T, 1)), np.ones((T, T), int)

    # Row t of a batch keeps the first t + 1 tokens and changes all that come after.
    changed = np.where(np.tri(T, dtype=bool), tokens, (tokens + 7) % VOCAB_SIZE)
    rows = np.asarray(at_once(weights, changed, positions, one))
    whole = rows[-1]
    for t in range(T):
        np.testing.assert_array_equal(rows[t, : t + 1], whole[: t + 1])
    assert np.abs(rows[0, 1:] - whole[1:]).max() > 1e-3

    # A pass over a prefix alone, at its own length, predicts what the one pass predicts there.
    prefix = at_once(weights, tokens[None, :PART], positions[:1, :PART], one[:1, :PART])[0]
    np.testing.assert_allclose(prefix, whole[:PART], atol=2e-5)

    # A document packed behind another one has the results that it has alone.
    behind = np.tile(np.arange(T) >= T - PART, (T, 1))
    packed = at_once(weights, changed, np.where(behind, positions - (T - PART), positions), one + behind)[-1]
    alone = at_once(weights, tokens[None, -PART:], positions[:1, :PART], one[:1, :PART])[0]
    np.testing.assert_allclose(packed[-PART:], alone, atol=2e-5)
    np.testing.assert_allclose(packed[:-PART], whole[:-PART], atol=2e-5)

    # So does decoding behind a prefix, in calls of CALL tokens, after each of which the cache is extended.
    weights = decoding_weights(config, weights)
    padded = np.pad(tokens[:-PART], (0, PART + CALL))
    log_p, whole_cache = prefill(weights, padded[None])
    cache = newest_of(config, whole_cache, np.array([T - PART]))
    decoded = [*log_p[0, : T - PART]]
    for begin in range(T - PART, T, CALL):
        recent, lengths = empty_cache(config, 1, CALL), np.array([begin])
        for place in range(begin, min(begin + CALL, T)):
            token, before = tokens[None, place : place + 1], tokens[None, place - 1 : place]
            log_p, recent = step(weights, token, place - begin, lengths, cache, recent, before)
            decoded.append(log_p[0, 0])
        cache = extended_cache(config, cache, recent, lengths)
    np.testing.assert_allclose(np.stack(decoded), whole, atol=2e-5)
