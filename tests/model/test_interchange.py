"""Names and layouts of Hugging Face's classes, both ways, and the same logits there (C7)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import interchange
from model.config import ModelConfig
from model.decoder import Decoder
from model.interchange.gpt import MASKS
from model.parameters import flattened, padded_vocabulary
from tests.peers import require
from tests.small import VOCAB_SIZE, small_batch, small_model, small_weights

CONTEXT = 24
GPT = {"position": "learned", "max_positions": CONTEXT, "gated": False, "num_kv_heads": 4, "norm": "layernorm"}
FIXED = GPT | {"position": "sinusoidal", "max_positions": None}
FIRST = {"norm_placement": "post", "feedforward_dim": 128}
BIASES = {"attention_bias": True, "feedforward_bias": True}
MODELS = [
    {},
    {"tie_embeddings": True, "activation": "gelu_tanh"},
    {"num_kv_heads": 1, "head_dim": 16, "rope_base": 500_000.0},
    BIASES,
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8},
    {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 8},
    {"rope_scaling": "linear", "rope_factor": 2.0},
    {"sliding_window": 5},
    {"qk_norm": True, "attention_bias": True, "head_dim": 16},
    {"qk_norm": True, "sliding_window": 3},
    {"scale_embeddings": True, "tie_embeddings": True, "activation": "gelu_tanh", "head_dim": 16},
    {"scale_embeddings": True, "tie_embeddings": True, "activation": "gelu"},
    GPT | BIASES | {"tie_embeddings": True, "activation": "gelu_tanh"},
    GPT | {"attention_bias": True, "activation": "gelu", "feedforward_dim": 48},
    FIXED | {"activation": "silu"},
    GPT | {"position": "none", "max_positions": None, "activation": "relu"},
    GPT | BIASES | FIRST | {"activation": "gelu_tanh", "tie_embeddings": True},
    # The decoder of Vaswani et al. 2017.
    FIXED | FIRST | {"activation": "relu", "feedforward_bias": True, "scale_embeddings": True, "tie_embeddings": True},
]
CLASSES = {
    "LlamaForCausalLM": 7,
    "MistralForCausalLM": 1,
    "Qwen3ForCausalLM": 2,
    "GemmaForCausalLM": 1,
    "GPT2LMHeadModel": 4,
    "OpenAIGPTLMHeadModel": 2,
}


def theirs_of(config: ModelConfig, weights: Any) -> tuple[dict, dict[str, np.ndarray]]:
    """(their config.json, their tensors)."""
    values = interchange.config_to_theirs(config, CONTEXT, eos_id=0)
    return values, dict(interchange.to_theirs(config, CONTEXT, interchange.reader_of(weights)))


def without_padding(weights: Any) -> dict[str, np.ndarray]:
    axis = {"embedding.table": 0, "unembedding.matrix": 1}
    found = flattened(jax.device_get(weights))
    return {name: np.take(x, range(VOCAB_SIZE), axis[name]) if name in axis else x for name, x in found.items()}


def assert_comes_back(config: ModelConfig, weights: Any) -> None:
    values, theirs = theirs_of(config, weights)
    assert {name: array.shape for name, array in theirs.items()} == interchange.shapes_of_theirs(config, CONTEXT)
    again = interchange.config_from_theirs(values)
    assert again == config
    assert interchange.context_from_theirs(values) == CONTEXT
    interchange.check_theirs(again, CONTEXT, theirs, theirs.__getitem__)
    back = interchange.from_theirs(again, CONTEXT, theirs.__getitem__)
    # A factor that is no power of two, or a norm's w less one: the last bit may be another.
    folds = config.scale_embeddings and not config.tie_embeddings and not math.log2(config.model_dim) % 2 == 0
    rounded = folds or values["model_type"] == "gemma"
    same = np.testing.assert_allclose if rounded else np.testing.assert_array_equal
    for (name, found), kept in zip(without_padding(back).items(), without_padding(weights).values(), strict=True):
        same(found, kept, **({"rtol": 1e-6, "atol": 1e-7} if rounded else {}))
        assert found.dtype == np.float32, name
    assert padded_vocabulary(config) > VOCAB_SIZE


def logits(config: ModelConfig, weights: Any, tokens: np.ndarray) -> np.ndarray:
    decoder = Decoder(config, weights)
    positions = jnp.tile(jnp.arange(CONTEXT), (2, 1))
    x_BTD = decoder(jnp.array(tokens), positions, jnp.ones((2, CONTEXT), jnp.int32))
    return np.asarray(decoder.logits(x_BTD))[..., :VOCAB_SIZE]


def model_of(values: dict) -> Any:
    """Their model, untrained."""
    transformers = require("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert [type(model).__name__] == values["architectures"]
    return model.eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = require("torch")
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    return found


def assert_same_logits(config: ModelConfig, weights: Any) -> None:
    torch, (values, theirs) = require("torch"), theirs_of(config, weights)
    model = model_of(values)
    missing = model.load_state_dict({name: torch.tensor(array) for name, array in theirs.items()}, strict=False)
    assert missing.unexpected_keys == []
    assert set(missing.missing_keys) <= ({"lm_head.weight"} if values["tie_word_embeddings"] else set())
    tokens = small_batch(2, CONTEXT)["tokens"]
    assert np.abs(logits(config, weights, tokens) - their_logits(model, tokens)).max() <= 1e-4


def a_model(changes: dict) -> ModelConfig:
    config = small_model(**changes)
    # What is left to the vocabulary's size is resolved as it is on reading.
    return ModelConfig(**{**config.__dict__, "loss_chunk": None}).resolved()


@pytest.mark.parametrize("changes", MODELS)
def test_weights_and_config_come_back_bit_for_bit(changes: dict):
    config = a_model(changes)
    assert_comes_back(config, small_weights(config))


@pytest.mark.parametrize("changes", MODELS)
def test_transformers_computes_the_same_logits(changes: dict):
    config = a_model(changes)
    assert_same_logits(config, small_weights(config))


def test_all_families_are_among_those_models():
    found = [interchange.family_of(a_model(changes)).architecture for changes in MODELS]
    assert set(found) == set(CLASSES) == {family.architecture for family in interchange.FAMILIES}
