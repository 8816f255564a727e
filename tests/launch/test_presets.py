"""Presets: each opens with its command and says how large its model is, and the larger ones are checked by shapes."""

import ast
import math

import jax
import pytest

from launch.presets import PRESETS, load_config, presets
from model.parameters import count_parameters, initial_weights, parameter_table
from tests.peers import require

COUNTS = {
    "tiny": 5_048_576,
    "small": 125_848_320,
    "vaswani_base": 37_846_016,
    "gpt2_124m": 124_439_808,
    "gpt3_175b": 174_604_259_328,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
}


def test_every_preset_is_counted_here():
    assert sorted(COUNTS) == presets()


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_opens_with_its_command_and_has_its_number_of_parameters(name: str):
    docstring = ast.get_docstring(ast.parse((PRESETS / f"{name}.py").read_text()))
    assert docstring is not None
    assert f"ziggurat pretrain --config={name}" in docstring.splitlines()[0]
    assert f"{COUNTS[name]:,} parameters" in docstring
    config = load_config(name, {})
    model = config.resolved(config.tokenizer.vocab_size).model
    shapes = jax.eval_shape(lambda: initial_weights(model, 0))
    padding = sum(math.prod(p.shape) for p in parameter_table(model).values()) - count_parameters(model)
    assert sum(x.size for x in jax.tree.leaves(shapes)) - padding == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "theirs", "values"),
    [
        ("gpt2_124m", "GPT2LMHeadModel", {}),
        ("llama2_7b", "LlamaForCausalLM", {"intermediate_size": 11008, "vocab_size": 32000}),
        (
            "llama3_8b",
            "LlamaForCausalLM",
            {"intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8},
        ),
        (
            "qwen3_0_6b",
            "Qwen3ForCausalLM",
            {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
            | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        ),
    ],
)
def test_published_presets_have_as_many_parameters_in_transformers(name: str, theirs: str, values: dict):
    torch, transformers = require("torch"), require("transformers")
    model_class = getattr(transformers, theirs)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    assert model.num_parameters() == COUNTS[name]
