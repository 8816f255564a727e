"""Reward models in the classes of Transformers with a linear head: the same scores, there and back (C7)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decoder import Decoder
from model.interchange.family import CLASSIFIERS
from model.interchange.gguf import GGUFExport
from model.interchange.huggingface import Interchange, family_of
from model.interchange.tensors import nested_weights, reader_of
from tests.peers import require
from tests.small import small_model, small_weights

CONTEXT = 24
GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "scale_embeddings": True, "norm_offset": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"attention_bias": True, "attention_output_bias": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"norm_placement": "both", "attention_softcap": 20.0, "sliding_window": 8, "layer_pattern": "SF"},
}


def model_of(model_type: str) -> Interchange:
    model = Interchange(small_model(reward_head=True, loss_chunk=None, **MODELS[model_type]), CONTEXT)
    assert model.family.model_type == model_type
    return model


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_transformers_gives_the_same_score_of_texts_of_any_length(model_type: str):
    torch, transformers = require("torch"), require("transformers")
    model = model_of(model_type)
    weights = small_weights(model.config)
    hf_config = model.export_config(bos_id=0, eos_id=2) | {"pad_token_id": 2}
    assert hf_config["architectures"] == [model.family.architecture.replace("CausalLM", "SequenceClassification")]
    theirs = transformers.AutoModelForSequenceClassification.from_config(
        transformers.AutoConfig.for_model(**hf_config), attn_implementation="eager"
    ).eval()
    tensors = {name: torch.tensor(array) for name, array in model.export_tensors(reader_of(weights))}
    assert theirs.load_state_dict(tensors, strict=True)
    assert tensors["score.weight"].shape == (1, 32)

    tokens = np.random.default_rng(0).integers(3, 300, (3, CONTEXT))
    lengths = np.array([CONTEXT, 17, 3])
    tokens[np.arange(CONTEXT) >= lengths[:, None]] = 2
    mask = torch.tensor(np.arange(CONTEXT) < lengths[:, None])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=mask).logits.numpy()
    assert expected.shape == (3, 1)
    decoder = Decoder(model.config, weights)
    positions = jnp.tile(jnp.arange(CONTEXT), (3, 1))
    found = jax.jit(lambda *batch: decoder.scores(decoder(*batch)))(tokens, positions, jnp.ones_like(positions))
    assert np.abs(expected).max() > 0.05
    assert np.abs(found[np.arange(3), lengths - 1] - expected[:, 0]).max() <= 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_an_export_is_read_back_as_the_same_model(model_type: str):
    model = model_of(model_type)
    weights = small_weights(model.config)
    tensors = dict(model.export_tensors(reader_of(weights)))
    again = Interchange.from_config(model.export_config(bos_id=0, eos_id=2))
    assert again.config == model.config
    names = again.full_names(tensors)
    again.check_tensors(names, tensors.__getitem__)
    found = nested_weights(again.config, again.import_reader(tensors.__getitem__))
    np.testing.assert_array_equal(found["unembedding"]["head"], weights["unembedding"]["head"])
    for name, array in again.export_tensors(reader_of(found)):
        np.testing.assert_array_equal(array, tensors[name], name)


def test_what_no_file_can_hold_is_refused():
    model = model_of("llama")
    hf_config = model.export_config(bos_id=0, eos_id=2)
    for labels in (None, {"0": "good", "1": "bad"}):
        with pytest.raises(ValueError, match="id2label is .*; a reward model has one label"):
            Interchange.from_config(hf_config | {"id2label": labels})
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel in Transformers has no model.reward_head = True"):
        gpt = {"position": "learned", "max_positions": CONTEXT, "activation": "gelu_tanh", "gated": False}
        gpt |= {"attention_bias": True, "feedforward_bias": True, "norm": "layernorm", "num_kv_heads": 4}
        family_of(small_model(reward_head=True, loss_chunk=None, **gpt))
    with pytest.raises(ValueError, match="llama.cpp predicts tokens, and a model with model.reward_head does not"):
        GGUFExport(model)
