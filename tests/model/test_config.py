"""The decoder's settings: derived values and what is impossible."""

import pytest

from model.config import ModelConfig


def test_what_is_left_out_is_derived():
    config = ModelConfig(model_dim=256, num_heads=4).resolved(vocab_size=1000)
    assert (config.num_kv_heads, config.head_dim, config.feedforward_dim, config.vocab_size) == (4, 64, 704, 1000)
    assert config.problems() == []
    assert ModelConfig(vocab_size=50).resolved(1000).vocab_size == 50


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "model.num_layers is 0"),
        ({"model_dim": 100, "num_heads": 3}, "does not divide by model.num_heads = 3"),
        ({"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads = 3 does not divide"),
        ({"head_dim": 7}, "model.head_dim is odd"),
        ({"compute_dtype": "float16"}, "must be one of bfloat16, float32"),
        ({"remat_policy": "some"}, "must be one of none, products, full"),
        ({"rope_base": 0.0}, "model.rope_base is 0.0"),
    ],
)
def test_impossible_values_are_named(changes: dict, words: str):
    assert any(words in problem for problem in ModelConfig(**changes).problems())
