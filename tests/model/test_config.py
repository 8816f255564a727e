"""The decoder's settings: derived values and what is impossible."""

import pytest

from model.config import ModelConfig


def test_what_is_left_out_is_derived():
    config = ModelConfig(model_dim=256, num_heads=4).resolved(vocab_size=1000)
    assert (config.num_kv_heads, config.head_dim, config.feedforward_dim, config.vocab_size) == (4, 64, 704, 1000)
    assert config.problems() == []
    assert ModelConfig(vocab_size=50).resolved(1000).vocab_size == 50
    assert ModelConfig(gated=False).resolved(1000).feedforward_dim == 1024
    assert ModelConfig(position="learned").resolved(1000, 32).max_positions == 32
    assert ModelConfig().resolved(200_000).loss_chunk == 1342


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"model_dim": 100, "num_heads": 3}, "does not divide by model.num_heads = 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads = 3 does not divide"),
        ({"head_dim": 7}, "model.head_dim is odd"),
        ({"compute_dtype": "float16"}, "must be one of bfloat16, float32"),
        ({"matmul_dtype": "bfloat16"}, "model.matmul_dtype is 'bfloat16'; it must be one of float8, int8"),
        (
            {"matmul_dtype": "int8", "num_experts": 4},
            "model.num_experts = 4: experts are multiplied in model.compute_dtype; leave model.matmul_dtype at none",
        ),
        ({"remat_policy": "some"}, "must be one of none, products, projections, attention, full"),
        ({"rope_base": 1.0}, "model.rope_base is 1.0; it must be above 1"),
        ({"rope_high_turns": 0.0}, "model.rope_high_turns is 0.0; it must be above 0"),
        ({"position": "alibi"}, "model.position is 'alibi'; it must be one of rope, sinusoidal, learned, none"),
        ({"activation": "swish"}, "must be one of silu, gelu, gelu_tanh, relu"),
        ({"norm_placement": "sandwich"}, "must be one of pre, post"),
        ({"residual_dropout": 1.0}, "model.residual_dropout is 1.0; it must be in [0, 1)"),
        ({"label_smoothing": -0.1}, "model.label_smoothing is -0.1"),
        ({"z_loss": -1.0}, "model.z_loss is -1.0"),
        ({"sliding_window": 0}, "model.sliding_window is 0"),
        ({"value_embedding_every": 0}, "model.value_embedding_every is 0; it must be from 1 to"),
        (
            {"kv_latent_dim": 8, "rope_dim": 2, "head_dim": 8, "value_embedding_every": 2},
            "model.kv_latent_dim = 8: values are made of latents; leave model.value_embedding_every at none",
        ),
        ({"attention_softcap": 0.0}, "model.attention_softcap is 0.0; it must be above 0"),
        ({"max_positions": 9}, "model.max_positions is for learned positions"),
        ({"position": "sinusoidal", "model_dim": 33, "num_heads": 3}, "model.model_dim = 33 is odd"),
        ({"rope_factor": 2.0}, "model.rope_factor has no effect with model.rope_scaling = none; leave it at 1.0"),
        ({"rope_scaling": "yarn"}, "needs model.rope_original_context"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "model.rope_factor is 0.5; it must be at least 1"),
        ({"rope_scaling": "linear", "position": "none"}, "model.rope_scaling has no effect with model.position = none"),
        ({"rope_base": 5e5, "position": "learned"}, "model.rope_base has no effect with model.position = learned"),
        ({"rope_low_turns": 2.0}, "model.rope_low_turns has no effect with model.rope_scaling = none"),
        ({"rope_scaling": "linear", "rope_original_context": 9}, "model.rope_original_context has no effect with"),
        (
            {"rope_scaling": "llama3", "rope_original_context": 9, "rope_low_turns": 5.0},
            "model.rope_high_turns must be above",
        ),
    ],
)
def test_impossible_values_are_named(changes: dict, words: str):
    assert any(words in problem for problem in ModelConfig(**changes).problems())
