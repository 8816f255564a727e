"""Names and layouts of Hugging Face's Llama, both ways, and the same logits there (C7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decoder import Decoder
from model.interchange import llama
from model.parameters import flattened, padded_vocabulary
from tests.peers import require
from tests.small import VOCAB_SIZE, small_batch, small_model, small_weights

MODELS = [
    {},
    {"tie_embeddings": True, "activation": "gelu_tanh"},
    {"num_kv_heads": 1, "head_dim": 16, "rope_base": 500_000.0},
    {"attention_bias": True, "feedforward_bias": True},
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8},
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 8},
    {"rope_scaling": "linear", "rope_factor": 2.0},
    {"sliding_window": 5},
    {"qk_norm": True, "attention_bias": True, "head_dim": 16},
    {"qk_norm": True, "sliding_window": 3},
]


@pytest.mark.parametrize("changes", MODELS)
def test_weights_and_config_come_back_bit_for_bit(changes: dict):
    config = small_model(**changes)
    weights = small_weights(config)
    theirs = llama.to_theirs(config, weights)
    assert theirs["model.embed_tokens.weight"].shape == (VOCAB_SIZE, config.model_dim)
    again = llama.config_from_theirs(llama.config_to_theirs(config, context=16, eos_id=0))
    assert again == small_model(**changes, loss_chunk=again.loss_chunk)
    back = flattened(llama.from_theirs(again, theirs.__getitem__))
    for name, array in flattened(jax.device_get(weights)).items():
        assert back[name].shape == array.shape
        axis = {"embedding.table": 0, "unembedding.matrix": 1}.get(name)
        kept = array if axis is None else np.take(array, np.arange(VOCAB_SIZE), axis)
        found = back[name] if axis is None else np.take(back[name], np.arange(VOCAB_SIZE), axis)
        np.testing.assert_array_equal(found, kept)
    assert padded_vocabulary(config) > VOCAB_SIZE


@pytest.mark.parametrize("changes", MODELS)
def test_transformers_computes_the_same_logits(changes: dict):
    torch, transformers = require("torch"), require("transformers")
    config = small_model(**changes)
    weights, tokens = small_weights(config), small_batch(2, 24)["tokens"]
    values = llama.config_to_theirs(config, context=24, eos_id=0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert [type(theirs).__name__] == values["architectures"]
    tensors = {name: torch.tensor(array) for name, array in llama.to_theirs(config, weights).items()}
    missing = theirs.load_state_dict(tensors, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    decoder = Decoder(config, weights)
    positions = jnp.tile(jnp.arange(24), (2, 1))
    found = decoder.logits(decoder(jnp.array(tokens), positions, jnp.ones((2, 24), jnp.int32)))
    assert np.abs(found[..., :VOCAB_SIZE] - expected).max() <= 1e-4


def test_a_model_with_other_floors_is_refused_by_name():
    theirs = llama.config_to_theirs(small_model(), context=16, eos_id=0)
    for changes, word in (
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is longrope"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is None; it must be a number"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is dynamic"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"head_dim": "64"}, "head_dim is '64'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a whole number"),
        ({"attention_bias": "no"}, "attention_bias is 'no'; it must be true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "rope_parameters.truncate"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
    ):
        with pytest.raises(ValueError, match=word):
            llama.config_from_theirs(theirs | changes)
    del theirs["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        llama.config_from_theirs(theirs)


def test_scalings_of_older_files_are_read():
    theirs = llama.config_to_theirs(small_model(), context=16, eos_id=0)
    theirs |= {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}
    config = llama.config_from_theirs(theirs)
    assert (config.rope_scaling, config.rope_factor, config.rope_base) == ("linear", 4.0, 5e5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "sinusoidal"}, "LlamaForCausalLM in Transformers has no model.position = sinusoidal"),
        ({"norm": "layernorm", "gated": False}, "no model.norm = layernorm, no model.gated = False"),
        ({"attention_softcap": 30.0}, "no model.attention_softcap = 30.0"),
        (
            {"sliding_window": 4, "attention_bias": True},
            "MistralForCausalLM in Transformers has no model.attention_bias",
        ),
        ({"qk_norm": True, "feedforward_bias": True}, "Qwen3ForCausalLM in Transformers has no model.feedforward_bias"),
    ],
)
def test_what_no_class_of_theirs_has_is_named(changes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        llama.family(small_model(**changes))
