"""Stacks of layers of several kinds: next to the same layers one by one, and as they generate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.layers
from model.attention import attend, causal_mask
from model.config import ModelConfig, ResolvedModelConfig
from model.decoder import Block, Decoder, Inputs
from model.generation.decoder import empty_cache
from model.generation.generator import Generator
from model.generation.sampling import Sampling
from model.layers import layer_kinds, layers_with, prefix_and_period
from model.parameters import initial_weights
from tests.small import small_model, small_weights

RECORDS = {"residual_scalars": True, "attention_gate": True, "value_embedding_every": 3}
WITH_EXPERTS = "SfF"
# Patterns and depths: two periods behind a prefix, two without one, a prefix and one layer.
STACKS = [("SF", 5), ("SNF", 6), ("SSF", 4)]


def patterned(pattern: str, num_layers: int, **changes: object) -> ResolvedModelConfig:
    """A model with these layers; with small letters capital ones have experts, but not the first of the stack."""
    windows = {"sliding_window": 5, "window_rope_base": 500.0} if "S" in pattern else {}
    experts = {"num_experts": 4, "expert_dim": 24, "shared_expert_dim": 16, "dense_layers": 1}
    experts = experts if pattern != pattern.upper() else {}
    return small_model(layer_pattern=pattern, num_layers=num_layers, **windows, **experts, **changes)


def of_layer(config: ResolvedModelConfig, weights: dict, layer: int) -> dict:
    """The weights of one block."""
    stacks = {part: (tree, layers_with(config, part)) for part, tree in weights["blocks"].items()}
    return {
        part: jax.tree.map(lambda w, numbers=numbers: w[numbers.index(layer)], tree)
        for part, (tree, numbers) in stacks.items()
        if layer in numbers
    }


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [("SSSSSF", 26, (2, 6)), ("SSSF", 32, (0, 4)), ("F", 9, (0, 1)), ("SF", 2, (1, 1)), ("SNFFN", 5, (4, 1))],
)
def test_a_program_has_the_layers_of_a_prefix_and_of_one_period(pattern: str, num_layers: int, expected: tuple):
    kinds = layer_kinds(patterned(pattern, num_layers))
    prefix, period = prefix_and_period(kinds)
    assert prefix + period == sum(expected)
    assert (num_layers - prefix) % period == 0
    assert all(kinds[i] == kinds[prefix + (i - prefix) % period] for i in range(prefix, num_layers))


def a_batch(config: ResolvedModelConfig) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segment ids of two rows, and the slope of a sum of what a stack makes of them."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)), jnp.int32)
    slope = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, config.model_dim)), jnp.float32)
    return tokens, jnp.tile(jnp.arange(24), (2, 1)), jnp.asarray([[1] * 24, [1] * 9 + [2] * 15]), slope


@functools.cache
def one_by_one(pattern: str, num_layers: int, records: bool) -> tuple[jax.Array, dict]:
    """The sum and its gradient by layers, each called on its own."""
    config = patterned(pattern, num_layers, **(RECORDS if records else {}))
    tokens, positions, ids, slope = a_batch(config)

    def summed(weights: dict) -> jax.Array:
        decoder = Decoder(config, weights)
        x, rotations = decoder.position(decoder.embedding(tokens), positions)
        inputs = Inputs(tokens, x)
        for layer, kind in enumerate(layer_kinds(config)):
            block = Block(config, of_layer(config, weights, layer), decoder.layout)
            mask = causal_mask(ids, kind.window)
            over = lambda q, k, v, _, mask=mask: attend(q, k, v, mask)
            x, _ = block(x, rotations[kind.rope], over, inputs=inputs)
        return jnp.vdot(decoder.norm(x), slope)

    return jax.jit(jax.value_and_grad(summed))(small_weights(config))


@pytest.mark.parametrize(
    ("pattern", "num_layers", "records", "remat_policy", "most_unrolled"),
    [(*stack, False, "full", 0) for stack in STACKS]
    + [("SF", 5, False, "none", 0), ("SNF", 6, False, "none", 12)]
    + [("SNF", 6, True, "none", 12), ("SNF", 6, True, "none", 0), (WITH_EXPERTS, 8, True, "projections", 0)],
)
def test_a_stack_is_its_layers_one_by_one(
    pattern: str, num_layers: int, records: bool, remat_policy: str, most_unrolled: int, monkeypatch
):
    expected, expected_gradient = one_by_one(pattern, num_layers, records)
    monkeypatch.setattr(model.layers, "MOST_UNROLLED", most_unrolled)
    config = patterned(pattern, num_layers, remat_policy=remat_policy, **(RECORDS if records else {}))
    *batch, slope = a_batch(config)
    stacked = lambda w: jnp.vdot(Decoder(config, w)(*batch), slope)
    actual, gradient = jax.jit(jax.value_and_grad(stacked))(small_weights(config))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    for one, other in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()))


def test_a_program_of_96_layers_has_the_size_of_one_of_12(monkeypatch):
    monkeypatch.setattr(model.layers, "MOST_UNROLLED", 0)

    def size(num_layers: int) -> int:
        config = patterned("SN", num_layers, remat_policy="full")
        weights = jax.eval_shape(lambda: initial_weights(config, 0))
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        loss = lambda weights, tokens: jnp.sum(Decoder(config, weights)(tokens, tokens, tokens))
        return len(jax.jit(jax.grad(loss)).lower(weights, tokens).as_text().splitlines())

    assert size(96) == size(12)


@pytest.mark.parametrize(("pattern", "num_layers"), [("SNF", 3), (WITH_EXPERTS, 4)])
def test_greedy_tokens_are_those_of_whole_passes_beyond_the_window(pattern: str, num_layers: int):
    config = patterned(pattern, num_layers)
    weights = small_weights(config)
    prompts = [[1, 5, 9, 2, 7, 3, 8, 11, 13, 2, 6], [4, 4]]
    generator = Generator(config, weights, context=64, eos_id=-1)
    found: list[list[int]] = [[], []]
    for delta in generator(prompts, max_new_tokens=20, sampling=Sampling(top_k=1), batch_size=2):
        found[delta.prompt_index] += delta.tokens

    decoder = Decoder(config, weights)
    rows = np.zeros((2, 11 + 20), np.int32)  # what comes behind a text changes nothing in it
    for row, prompt, tokens in zip(rows, prompts, found, strict=True):
        row[: len(prompt) + 20] = prompt + tokens
    positions = np.tile(np.arange(31), (2, 1))
    logits = jax.jit(lambda rows: decoder.logits(decoder(rows, positions, jnp.ones_like(rows))))(rows)
    best = np.argmax(logits[..., : config.vocab_size], axis=-1)
    for row, prompt, tokens in zip(best, prompts, found, strict=True):
        assert tokens == row[len(prompt) - 1 :][:20].tolist()


@pytest.mark.parametrize(
    ("every", "expected"), [(None, []), (1, range(7)), (2, [0, 2, 4, 6]), (3, [0, 3, 6]), (9, [6])]
)
def test_every_nth_layer_from_the_last_on_has_a_value_embedding(every: int | None, expected: list):
    config = small_model(num_layers=7, value_embedding_every=every)
    assert layers_with(config, "value_embedding") == list(expected)
    weights = initial_weights(config, 0)["blocks"]
    assert len(weights.get("value_embedding", {"table": []})["table"]) == len(expected)
    # Half of the layers, and a period of two.
    assert prefix_and_period(layer_kinds(small_model(num_layers=8, value_embedding_every=2))) == (0, 2)


def test_a_layer_with_a_window_keeps_the_window_alone():
    lengths = [layer["value"].shape[2] for layer in empty_cache(patterned("SF", 4), 1, 1000)]
    assert lengths == [8, 1000, 8, 1000]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"layer_pattern": "SXF", "sliding_window": 4}, "X is no kind of layer; there are F (full attention), S"),
        ({"layer_pattern": "SSF"}, "give model.sliding_window"),
        ({"layer_pattern": "SSSSF", "sliding_window": 4}, "is longer than model.num_layers = 4"),
        ({"layer_pattern": "FN", "position": "learned"}, "N is for rotary positions"),
        ({"layer_pattern": "FN", "sliding_window": 4}, "model.sliding_window has no effect with model.layer_pattern"),
        ({"window_rope_base": 500.0}, "model.window_rope_base has no effect with no model.sliding_window"),
    ],
)
def test_what_a_pattern_needs_is_said(fields: dict, problem: str):
    assert problem in "\n".join(ModelConfig(**fields).problems())
