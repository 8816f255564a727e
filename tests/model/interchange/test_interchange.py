"""Exports to Transformers come back, and give the same logits there (C7)."""

import functools
import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.decoder import Decoder
from model.interchange.family import Family
from model.interchange.huggingface import FAMILIES, Interchange, family_of
from model.interchange.tensors import nested_weights, reader_of
from model.parameters import CONSTANT, Parameter, initial_weights, parameter_table
from model.trees import flattened, nested
from tests.model.interchange.expert_models import EXPERT_MODELS, EXPERTS, LATENT, SHARED, YARN
from tests.peers import require
from tests.small import small_batch, small_model

CONTEXT = 24
GPT = {"position": "learned", "max_positions": CONTEXT, "gated": False, "num_kv_heads": 4, "norm": "layernorm"}
FIXED = GPT | {"position": "sinusoidal", "max_positions": None}
FIRST = {"norm_placement": "post", "feedforward_dim": 128}
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")
BIASES = {"attention_bias": True, "feedforward_bias": True}
QWEN = {"qk_norm": True, "sliding_window": 3}
OLMO = {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"}
GEMMA = {"scale_embeddings": True, "tie_embeddings": True, "norm_placement": "both", "layer_pattern": "SF"}
GEMMA |= {"sliding_window": 5}
NEOX = {"norm": "layernorm", "gated": False}
MODELS = [
    {},
    {"tie_embeddings": True, "activation": "gelu_tanh"},
    {"num_kv_heads": 1, "head_dim": 16, "rope_base": 500_000.0},
    BIASES,
    {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_context": 8},
    YARN,
    YARN | {"rope_length": 1.5},
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
    {"attention_bias": True, "attention_output_bias": False},
    {"layer_pattern": "SF", "sliding_window": 5},
    {"layer_pattern": "FN"},
    {"layer_pattern": "N"},
    {"export_as": "phi3", "residual_dropout": 0.1},
    {"embedding_multiplier": 4.0, "residual_multiplier": 0.25, "logit_multiplier": 0.5, "attention_scale": 0.25},
    {"norm_placement": "both", "attention_bias": True, "attention_output_bias": False, "rope_dim": 4},
    OLMO,
    OLMO | {"layer_pattern": "SSF", "num_layers": 3, "sliding_window": 5} | YARN | {"window_rope_scaling": False},
    GEMMA | {"attention_softcap": 3.0, "logit_softcap": 2.0, "attention_scale": 0.5},
    GEMMA | {"qk_norm": True, "window_rope_base": 300.0, "norm_offset": True},
    NEOX | {"num_kv_heads": 4, "rope_dim": 2, "block": "parallel", "attention_bias": True, "norm_bias": False},
    {"norm": "layernorm", "rope_dim": 2, "block": "parallel_one_norm"},
    NEOX | {"activation": "gelu_tanh", "sliding_window": 5},
    LATENT,
    LATENT | {"export_as": "deepseek_v2", "query_latent_dim": 8} | YARN | {"attention_scale": 0.5, "rope_length": 1.0},
    {"norm": "layernorm", "norm_bias": False, "block": "parallel_one_norm", "layer_pattern": "SN", "sliding_window": 5},
    *EXPERT_MODELS,
]


def theirs_of(config: ModelConfig, weights: Any) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns (values of config.json, tensors) of the export."""
    model = Interchange(config, CONTEXT)
    return model.export_config(bos_id=0, eos_id=0), dict(model.export_tensors(reader_of(weights)))


def without_padding(config: ModelConfig, weights: Any) -> dict[str, np.ndarray]:
    axis = {"embedding.table": 0, "unembedding.matrix": 1}
    cut = lambda name, x: np.take(x, range(config.vocab_size or 0), axis[name]) if name in axis else x
    return {name: cut(name, x) for name, x in flattened(jax.device_get(weights)).items()}


def assert_comes_back(config: ModelConfig, weights: Any) -> None:
    values, theirs = theirs_of(config, weights)
    assert {name: array.shape for name, array in theirs.items()} == Interchange(config, CONTEXT).shapes
    model = Interchange.from_config(values)
    again = model.config
    # Dropouts that the class does not have are left out.
    assert again == replace(config, **{name: getattr(again, name) for name in DROPOUTS if getattr(again, name) == 0})
    assert model.context == CONTEXT
    model.check_tensors(theirs, theirs.__getitem__)
    back = nested_weights(again, model.import_reader(theirs.__getitem__))
    # Scaling by a factor that is no power of two, and subtracting one from a norm, may change the last bit.
    folds = config.scale_embeddings and not config.tie_embeddings and math.log2(config.model_dim) % 2 != 0
    rounded = folds or values["model_type"].startswith("gemma")
    expected = without_padding(config, weights)
    for name, found in without_padding(config, back).items():
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[name], rtol=1e-6 * rounded, atol=1e-7 * rounded, err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, weights: Any, tokens: np.ndarray) -> jax.Array:
    decoder = Decoder(config, weights)
    positions = jnp.tile(jnp.arange(CONTEXT), (2, 1))
    x_BTD = decoder(tokens, positions, jnp.ones((2, CONTEXT), jnp.int32))
    return decoder.logits(x_BTD)[..., : config.vocab_size]


def model_of(values: dict) -> Any:
    """Builds the untrained model of Transformers."""
    transformers = require("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert [type(model).__name__] == values["architectures"]
    return model.eval()


def loaded(values: dict, theirs: dict[str, np.ndarray]) -> Any:
    """Builds the model of Transformers with the tensors of a file, which it may store in another way."""
    torch, model = require("torch"), model_of(values)
    model, found = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict={name: torch.tensor(array) for name, array in theirs.items()},
        output_loading_info=True,
    )
    assert not found["unexpected_keys"]
    assert set(found["missing_keys"]) <= ({"lm_head.weight"} if values["tie_word_embeddings"] else set())
    return model.eval()


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = require("torch")
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    return found


def assert_same_logits(config: ModelConfig, weights: Any) -> None:
    values, theirs = theirs_of(config, weights)
    model = loaded(values, theirs)
    tokens = small_batch(2, CONTEXT)["tokens"] % config.vocab_size
    assert np.abs(logits(config, weights, tokens) - their_logits(model, tokens)).max() <= 1e-4


def a_model(changes: dict) -> ModelConfig:
    config = small_model(**changes)
    # The chunk of the loss follows from the vocabulary's size, as in an import.
    return ModelConfig(**{**config.__dict__, "loss_chunk": None}).resolved()


@pytest.mark.parametrize("changes", MODELS)
def test_weights_and_config_come_back_bit_for_bit(changes: dict):
    config = a_model(changes)
    assert_comes_back(config, random_weights(config))


@pytest.mark.parametrize("changes", MODELS)
def test_transformers_computes_the_same_logits(changes: dict):
    config = a_model(changes)
    assert_same_logits(config, random_weights(config))


def test_a_model_trained_under_mup_goes_out_as_any_other():
    config = a_model({"parametrization": "mup", "base_dim": 16, "base_layers": 1})
    weights = jax.jit(lambda: initial_weights(config, 0))()
    (values, tensors), (usual, others) = theirs_of(config, weights), theirs_of(a_model({}), weights)
    assert values == usual
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert all(np.array_equal(tensors[name], x) for name, x in others.items())
    assert_same_logits(config, weights)


def test_all_families_are_among_those_models():
    found = {family_of(a_model(changes)).architecture for changes in MODELS}
    assert found == {family.architecture for family in FAMILIES}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Draws a small model that some class has."""
    one_of = lambda *values: draw(st.sampled_from(values))
    H, C = one_of(1, 2, 4), one_of(2, 4)
    changes: dict[str, Any] = {"num_layers": one_of(1, 3), "model_dim": 4 * H, "num_heads": H, "head_dim": C}
    changes |= {"num_kv_heads": one_of(*(k for k in (1, 2, 4) if H % k == 0)), "feedforward_dim": one_of(8, 12)}
    changes |= {"tie_embeddings": one_of(True, False), "scale_embeddings": one_of(True, False)}
    changes |= {"vocab_size": one_of(5, 128, 130), "norm_epsilon": one_of(1e-5, 1e-6)}
    if one_of("llama", "gpt") == "gpt":
        position = one_of("learned", "sinusoidal", "none")
        changes |= {"position": position, "max_positions": CONTEXT if position == "learned" else None}
        changes |= {"num_kv_heads": H, "head_dim": 4, "gated": False, "norm": "layernorm"}
        changes |= {"norm_placement": one_of("pre", "post"), "activation": one_of("relu", "gelu_tanh", "silu")}
        changes |= {name: one_of(0.0, 0.25) for name in ("embedding_dropout", "residual_dropout")}
        if changes["norm_placement"] == "post":
            changes["feedforward_dim"] = 16 * H
    else:
        changes |= {"activation": one_of("silu", "gelu", "gelu_tanh"), "qk_norm": one_of(True, False)}
        changes |= {"sliding_window": one_of(None, 3), "rope_base": one_of(1e4, 5e5)}
        if changes["qk_norm"] or not changes["sliding_window"]:
            changes["attention_bias"] = one_of(True, False)
    return a_model(changes | {"attention_dropout": one_of(0.0, 0.5)})


def random_weights(config: ModelConfig) -> dict[str, Any]:
    """Returns weights as large as initial ones; norms, biases and others that begin alike are not all the same."""
    random = np.random.default_rng(0)

    def drawn(p: Parameter) -> np.ndarray:
        x = random.normal(size=p.shape)
        fan_in = math.prod(p.axes[axis] for axis in p.fan_in)
        return np.float32(p.scale + 0.2 * x if p.role in CONSTANT else p.scale / math.sqrt(fan_in) * x)

    return nested({name: drawn(p) for name, p in parameter_table(config).items()})


@given(config=models())
def test_any_model_that_a_class_has_comes_back(config: ModelConfig):
    assert_comes_back(config, random_weights(config))


@settings(max_examples=4)
@given(config=models())
def test_any_model_that_a_class_has_gives_the_same_logits_there(config: ModelConfig):
    require("torch")
    assert_same_logits(config, random_weights(config))


def test_a_norm_below_a_half_loses_no_more_than_rounding_in_gemma():
    config = a_model({"scale_embeddings": True, "tie_embeddings": True, "activation": "gelu_tanh"})
    weights = random_weights(config)
    exact = np.float32([0.5, 0.75, 1.0, 1.9999999, 3.3333333, 1000.123])
    lossy = np.float32([0.1, 1e-3, -0.7, 1e-9])
    weights["norm"]["scale"][:6], weights["norm"]["scale"][6:10] = exact, lossy
    _, theirs = theirs_of(config, weights)
    found = nested_weights(config, Interchange(config, CONTEXT).import_reader(theirs.__getitem__))["norm"]["scale"]
    np.testing.assert_array_equal(found[:6], exact)
    np.testing.assert_allclose(found[6:10], lossy, rtol=0, atol=1e-7)


def test_a_model_with_other_floors_is_refused_by_name():
    theirs = Interchange(a_model({}), 16).export_config(bos_id=0, eos_id=0)
    for changes, word in (
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type is ntk"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "original_max_position_embeddings is None"),
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
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "truncate": False}}, "rope_parameters.truncate"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"ziggurat": {"position": "sinusoid"}}, "ziggurat is {'position': 'sinusoid'}; it may hold position"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: in this decoder all components"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "in LlamaForCausalLM all layers are alike"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not read"),
    ):
        with pytest.raises(ValueError, match=re.escape(word)):
            Interchange.from_config(theirs | changes)
    del theirs["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        Interchange.from_config(theirs)
    gpt = Interchange(a_model(GPT), CONTEXT).export_config(bos_id=0, eos_id=0)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx is True; in this decoder it is False"):
        Interchange.from_config(gpt | {"scale_attn_by_inverse_layer_idx": True})
    gemma = Interchange(a_model({"scale_embeddings": True}), CONTEXT).export_config(bos_id=0, eos_id=0)
    with pytest.raises(ValueError, match="hidden_act and hidden_activation are not the same"):
        Interchange.from_config(gemma | {"hidden_activation": "gelu"})


SIZES = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 32}
GPT_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_keys_that_a_file_leaves_out_have_the_defaults_of_the_class(family: Family):
    classes = require("transformers").AutoConfig
    # A quarter of a head is rotated.
    wide = {"hidden_size": 256} if family.model_type in ("gpt_neox", "stablelm") else {}
    if family.model_type == "glm4_moe":
        wide = {"num_attention_heads": 8}
    if family.model_type.startswith("deepseek"):
        heads = 128 if family.model_type == "deepseek_v3" else 32
        wide = {"num_attention_heads": heads, "first_k_dense_replace": 2}
    short = {"vocab_size": 9, **(SIZES if family.model_type not in ("gpt2", "openai-gpt") else GPT_SIZES), **wide}
    whole = classes.for_model(family.model_type, **short).to_dict()
    named = {"architectures": [family.architecture]}
    from_short, from_whole = (Interchange.from_config(values | named) for values in (short, whole))
    assert from_short.config == from_whole.config
    assert from_short.context == from_whole.context


def test_keys_of_older_and_other_files_are_read_as_the_class_reads_them():
    def read(changes: dict, **more: Any) -> ModelConfig:
        return Interchange.from_config(Interchange(a_model(changes), CONTEXT).export_config(0, 0) | more).config

    gemma = {"scale_embeddings": True, "tie_embeddings": True}
    for changes, more, field, value in (
        (gemma, {"hidden_act": "gelu", "hidden_activation": None}, "activation", "gelu_tanh"),
        (GPT, {"activation_function": "gelu_pytorch_tanh"}, "activation", "gelu_tanh"),
        ({}, {"hidden_act": "swish"}, "activation", "silu"),
        ({}, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, "rope_factor", 3.0),
        (YARN, {"original_max_position_embeddings": 12}, "rope_original_context", 12),
        (QWEN, {"layer_types": ["sliding_attention"] * 2}, "sliding_window", 3),
        (QWEN, {"layer_types": ["full_attention"] * 2}, "sliding_window", None),
        (QWEN, {"layer_types": None, "max_window_layers": 2}, "sliding_window", None),
        (QWEN, {"layer_types": None, "max_window_layers": 1}, "layer_pattern", "FS"),
        (QWEN, {"layer_types": ["sliding_attention", "full_attention"]}, "layer_pattern", "SF"),
    ):
        assert getattr(read(changes, **more), field) == value, more


def test_rotary_scalings_are_written_where_older_versions_look_for_them():
    theirs = Interchange(a_model(YARN), CONTEXT).export_config(bos_id=0, eos_id=0)
    assert theirs["rope_scaling"] == theirs["rope_parameters"]
    assert Interchange(a_model({}), CONTEXT).export_config(bos_id=0, eos_id=0)["rope_scaling"] is None


@pytest.mark.parametrize("original", [4, 8, 16])
def test_yarns_positions_are_its_factor_times_the_original_ones_whatever_the_segment(original: int):
    """Transformers 4.55 takes their ratio as the factor, and leaves out the factor that the file gives."""
    config = a_model(YARN | {"rope_original_context": original})
    theirs = Interchange(config, CONTEXT).export_config(bos_id=0, eos_id=0)
    ratio = theirs["max_position_embeddings"] / theirs["rope_scaling"]["original_max_position_embeddings"]
    assert ratio == theirs["rope_scaling"]["factor"] == 4
    assert_comes_back(config, random_weights(config))
    assert_same_logits(config, random_weights(config))


@pytest.mark.parametrize("context", [12, CONTEXT])
def test_the_context_comes_back_where_the_table_of_positions_is_longer(context: int):
    theirs = Interchange(a_model(GPT), context).export_config(bos_id=0, eos_id=0)
    assert theirs["n_positions"] == CONTEXT
    model = Interchange.from_config(theirs)
    assert (model.context, model.config.max_positions) == (context, CONTEXT)
    for wrong in (0, CONTEXT + 1, "x", 1.5):
        with pytest.raises(ValueError, match="segment_length is .*; it must be"):
            Interchange.from_config(theirs | {"ziggurat": {"segment_length": wrong}})


def test_tensors_that_only_widen_the_model_must_equal_their_fillings():
    config = a_model(FIXED)
    values, theirs = theirs_of(config, random_weights(config))
    for name in ("transformer.wpe.weight", "transformer.h.1.attn.c_attn.bias"):
        changed = theirs | {name: theirs[name] + 0.1}
        with pytest.raises(ValueError, match="'position': 'sinusoidal'.*which the weights are not"):
            Interchange(config, CONTEXT).check_tensors(changed, changed.__getitem__)
    # Without that key they are trained positions and biases.
    del values["ziggurat"]
    model = Interchange.from_config(values)
    assert (model.config.position, model.config.attention_bias) == ("learned", True)
    model.check_tensors(changed, changed.__getitem__)


def test_scalings_of_older_files_are_read():
    theirs = Interchange(a_model({}), 16).export_config(bos_id=0, eos_id=0)
    theirs |= {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}
    config = Interchange.from_config(theirs).config
    assert (config.rope_scaling, config.rope_factor, config.rope_base) == ("linear", 4.0, 5e5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "sinusoidal"}, "LlamaForCausalLM in Transformers has no model.position = sinusoidal"),
        (
            {"norm": "layernorm", "gated": False, "qk_norm": True},
            "Starcoder2ForCausalLM in Transformers has no model.qk",
        ),
        (
            {"export_as": "phi3", "attention_bias": True},
            "model.export_as = phi3: Phi3ForCausalLM in Transformers has no",
        ),
        ({"layer_pattern": "SFN", "num_layers": 3, "sliding_window": 4}, "no model.layer_pattern = SFN"),
        ({"attention_softcap": 30.0}, "no model.attention_softcap = 30.0"),
        ({"smear": True}, "no model.smear = True"),
        ({"attention_gate": True}, "no model.attention_gate = True"),
        ({"value_embedding_every": 2}, "no model.value_embedding_every = 2"),
        ({"residual_scalars": True}, "no model.residual_scalars = True"),
        (
            {"sliding_window": 4, "attention_bias": True},
            "no model.sliding_window = 4; MistralForCausalLM in Transformers has no model.attention_bias = True",
        ),
        (EXPERTS | {"norm": "layernorm"}, "MixtralForCausalLM in Transformers has no model.norm = layernorm"),
        (EXPERTS | {"dense_layers": 1}, "MixtralForCausalLM in Transformers has no model.dense_layers = 1"),
        (EXPERTS | SHARED, "MixtralForCausalLM in Transformers has no model.shared_expert_dim = 48"),
        (EXPERTS | {"export_as": "llama"}, "LlamaForCausalLM in Transformers has no model.num_experts = 4"),
        ({"qk_norm": True, "feedforward_bias": True}, "Qwen3ForCausalLM in Transformers has no model.feedforward_bias"),
        (GPT | {"num_kv_heads": 2}, "GPT2LMHeadModel in Transformers has no model.num_kv_heads = 2"),
        (
            GPT | {"norm_placement": "post", "feedforward_dim": 64},
            "OpenAIGPTLMHeadModel in Transformers has no model.feedforward_dim = 64",
        ),
    ],
)
def test_choices_that_no_class_has_are_named(changes: dict, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        family_of(a_model(changes))


@pytest.mark.parametrize("changes", [{}, {"activation": "relu2"}, GEMMA | {"logit_softcap": 15.0}])
def test_outputs_that_started_at_zero_are_exported_as_others(changes: dict):
    family = family_of(a_model(changes))
    assert family_of(a_model(changes | {"zero_init_outputs": True})) is family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_key_that_is_missing_has_the_default_of_transformers(family: Family):
    theirs = require("transformers").AutoConfig.for_model(family.model_type)
    for key in (*family.keys, family.context):
        if key.default is not None:
            assert key.default == getattr(theirs, key.key), key.key
