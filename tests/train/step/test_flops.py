"""The formula of model FLOPs, and what this machine can do."""

import jax
import pytest

from model.decoder import Decoder
from tests.small import RECORDS, small_batch, small_model, small_weights
from train.step.flops import flops_per_token, memory_bytes, peak_flops


def test_memory_is_what_this_process_has_had_at_most():
    before = memory_bytes()
    held = bytearray(2**27)
    assert 2**25 < before <= memory_bytes()
    assert memory_bytes() >= len(held)


@pytest.mark.parametrize("tie", [True, False])
def test_the_flops_formula_is_that_of_the_products_in_the_forward_pass_times_three(tie: bool):
    config = small_model(tie_embeddings=tie, model_dim=128, feedforward_dim=512, vocab_size=1024)
    batch = small_batch(4, 128)

    def logits(weights, tokens, positions, segment_ids):
        decoder = Decoder(config, weights)
        return decoder.logits(decoder(tokens, positions, segment_ids))

    arguments = (batch["tokens"], batch["positions"], batch["segment_ids"])
    lowered = jax.jit(logits).lower(small_weights(config), *arguments)
    compiled = lowered.compile().cost_analysis()["flops"]
    # The compiler counts the body of the layer loop once, and attention without causality.
    one_layer = small_model(num_layers=1, tie_embeddings=tie, model_dim=128, feedforward_dim=512, vocab_size=1024)
    attention = 12 * 4 * 32 * 128 / 2
    expected = (flops_per_token(one_layer, 128) + attention) / 3 * 4 * 128
    assert compiled == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("window", [None, 1, 100, 1000, 5000])
def test_the_flops_formula_counts_the_keys_that_a_position_attends_to(window: int | None):
    T = 1000
    keys = sum(min(position + 1, window or T) for position in range(T)) / T
    # A segment of one token has half a key by the formula, and the same matrices.
    of_attention = flops_per_token(small_model(sliding_window=window), T) - flops_per_token(small_model(), 1)
    assert of_attention / (12 * 2 * 4 * 8) == pytest.approx(keys - 0.5, rel=0.01)


def test_the_peak_of_a_cpu_is_measured_and_says_so():
    flops, source = peak_flops("float32")
    assert flops > 1e9
    assert "measured here" in source


def test_the_flops_formula_counts_gates_and_no_look_ups_and_no_scalars():
    plain = flops_per_token(small_model(gated=False), 1000)
    gates = 32 + 2 * 32 * 4 + 32 * 2
    assert flops_per_token(small_model(**RECORDS), 1000) - plain == 6 * gates
