"""Presets: each opens with its command and the size of its model; the larger ones are checked by shapes."""

import ast
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from launch.presets import PRESETS, load_config, presets
from model.interchange.huggingface import Interchange
from model.parameters import count_parameters, initial_weights, parameter_table
from tests.launch.small_run import here, metrics, write_corpus
from tests.peers import require
from tests.theirs import assert_same_logits
from train.step.schedule import batch_size

COUNTS = {
    "tiny": 2_360_512,
    "tiny_experts": 4_133_056,
    "small": 125_849_856,
    "small_cpu": 12_588_672,
    "vaswani_base": 37_846_016,
    "gpt2_124m": 124_439_808,
    "gpt3_175b": 174_604_259_328,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "pythia_160m": 162_322_944,
    "qwen2_5_0_5b": 494_032_768,
    "gemma3_1b": 999_885_952,
    "olmo2_1b": 1_484_916_736,
    "smollm3_3b": 3_075_098_624,
    "olmo3_7b": 7_298_011_136,
    "mixtral_8x7b": 46_702_792_704,
    "olmoe_1b_7b": 6_919_161_856,
    "qwen3_30b_a3b": 30_532_122_624,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352,
    "kimi_k2": 1_026_408_209_408,
    "gpt_oss_20b": 20_914_757_184,
}
# Biases that balance the load, which are no parameters of their class.
BIASES = {"deepseek_v3": 14_848, "kimi_k2": 23_040}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "moe_layer_freq": 1}
LATENT |= {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0}
LATENT |= {"aux_loss_alpha": 0.001, "seq_aux": True, "tie_word_embeddings": False}
LATER = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
# Those of models with experts.
HUB_EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {
        "architectures": ["MixtralForCausalLM"],
        **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 32_768, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8},
        **{"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "tie_word_embeddings": False},
    },
    "olmoe_1b_7b": {
        "architectures": ["OlmoeForCausalLM"],
        **{"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "vocab_size": 50_304, "max_position_embeddings": 4096, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "rope_scaling": None, "clip_qkv": None, "num_experts": 64},
        **{"num_experts_per_tok": 8, "norm_topk_prob": False, "router_aux_loss_coef": 0.01, "attention_bias": False},
    },
    "qwen3_30b_a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        **{"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32},
        **{"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 32_768},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "hidden_act": "silu", "num_experts": 128},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "mlp_only_layers": []},
        **{"decoder_sparse_step": 1, "router_aux_loss_coef": 0.001, "use_sliding_window": False},
        **{"sliding_window": None, "max_window_layers": 48, "attention_bias": False, "tie_word_embeddings": False},
    },
    "deepseek_v2_lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        **LATENT,
        **{"hidden_size": 2048, "intermediate_size": 10_944, "num_hidden_layers": 27, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "vocab_size": 102_400, "max_position_embeddings": 163_840, "q_lora_rank": None},
        **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        **{"norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "rope_theta": 10_000},
        "rope_scaling": LATER | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **LATENT,
        **{"hidden_size": 7168, "intermediate_size": 18_432, "num_hidden_layers": 61, "num_attention_heads": 128},
        **{"num_key_value_heads": 128, "vocab_size": 129_280, "max_position_embeddings": 163_840, "q_lora_rank": 1536},
        **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        **{"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "rope_theta": 10_000},
        "rope_scaling": LATER | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "kimi_k2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        **LATENT,
        **{"hidden_size": 7168, "intermediate_size": 18_432, "num_hidden_layers": 61, "num_attention_heads": 64},
        **{"num_key_value_heads": 64, "vocab_size": 163_840, "max_position_embeddings": 131_072, "q_lora_rank": 1536},
        **{"n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"},
        **{"norm_topk_prob": True, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "rope_theta": 50_000.0},
        "rope_scaling": LATER
        | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0}
        | {"mscale_all_dim": 1.0},
    },
    "gpt_oss_20b": {
        "architectures": ["GptOssForCausalLM"],
        **{"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64},
        **{"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088, "max_position_embeddings": 131_072},
        **{"rms_norm_eps": 1e-5, "rope_theta": 150_000, "hidden_act": "silu", "attention_bias": True},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "router_aux_loss_coef": 0.9, "swiglu_limit": 7.0},
        **{"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
}
# What decides shapes and computation in the config.json of the published models.
HUB: dict[str, dict[str, Any]] = {
    "pythia_160m": {
        "architectures": ["GPTNeoXForCausalLM"],
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        **{"vocab_size": 50_304, "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "gelu"},
        **{"layer_norm_eps": 1e-5, "rotary_emb_base": 10_000, "rotary_pct": 0.25, "use_parallel_residual": True},
    },
    "qwen2_5_0_5b": {
        "architectures": ["Qwen2ForCausalLM"],
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 32_768, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "tie_word_embeddings": True, "attention_dropout": 0.0},
        **{"use_sliding_window": False, "sliding_window": 32_768, "max_window_layers": 24},
    },
    "gemma3_1b": {
        "architectures": ["Gemma3ForCausalLM"],
        **{"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4},
        **{"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144, "max_position_embeddings": 32_768},
        **{"rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": None},
        **{"sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "attention_bias": False},
        **{"hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": None, "attn_logit_softcapping": None},
    },
    "olmo2_1b": {
        "architectures": ["Olmo2ForCausalLM"],
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16},
        **{"num_key_value_heads": 16, "vocab_size": 100_352, "max_position_embeddings": 4096, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-6, "rope_theta": 500_000, "rope_scaling": None, "tie_word_embeddings": False},
        **{"attention_bias": False, "attention_dropout": 0.0},
    },
    "smollm3_3b": {
        "architectures": ["SmolLM3ForCausalLM"],
        **{"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16},
        **{"num_key_value_heads": 4, "vocab_size": 128_256, "max_position_embeddings": 65_536, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-6, "rope_theta": 5_000_000.0, "rope_scaling": None, "tie_word_embeddings": True},
        **{"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False},
        **{"attention_bias": False, "mlp_bias": False, "sliding_window": None, "max_window_layers": 28},
    },
    "olmo3_7b": {
        "architectures": ["Olmo3ForCausalLM"],
        **{"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 32, "vocab_size": 100_278, "max_position_embeddings": 65_536, "hidden_act": "silu"},
        **{"rms_norm_eps": 1e-6, "rope_theta": 500_000, "tie_word_embeddings": False, "attention_bias": False},
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
            **{"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0},
        },
        **{"sliding_window": 4096, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8},
    },
    **HUB_EXPERTS,
}
# Fields of ours that no config.json has, and those of a later stage of training.
OF_TRAINING = {"compute_dtype", "matmul_dtype", "remat_policy", "loss_chunk", "z_loss", "router_z_loss"}
EXTENDED = {"olmo3_7b": {"rope_scaling", "rope_factor", "rope_original_context", "rope_high_turns"}}
EXTENDED["olmo3_7b"] |= {"window_rope_scaling"}
YARN = {"rope_scaling", "rope_factor", "rope_original_context", "rope_high_turns"}
EXTENDED |= dict.fromkeys(("deepseek_v2_lite", "deepseek_v3", "kimi_k2"), YARN | {"attention_scale", "rope_length"})
# The paper of DeepSeek-V3 gives a tenth of the weight in its config.json, and gpt-oss's is no published recipe.
EXTENDED["deepseek_v3"] = EXTENDED["deepseek_v3"] | {"balance_loss"}
EXTENDED["gpt_oss_20b"] = YARN | {"rope_truncate", "balance_loss"}


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
    assert sum(x.size for x in jax.tree.leaves(shapes)) - padding == COUNTS[name] + BIASES.get(name, 0)


def test_gpt3_trains_on_the_tokens_of_its_paper():
    config = load_config("gpt3_175b", {}).resolved(50_257)
    rows = np.array([batch_size(config, step) for step in range(config.train.num_steps)])
    tokens = rows * config.data.segment_length
    ramp = rows < config.train.batch_size
    assert tokens[: config.optimizer.warmup_steps].sum() == pytest.approx(375e6, rel=0.01)
    assert tokens[ramp].sum() == pytest.approx(12e9, rel=0.01)
    assert tokens.sum() == pytest.approx(300e9, rel=0.01)


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
        *((name, values["architectures"][0], values) for name, values in HUB.items()),
    ],
)
def test_published_presets_have_the_parameters_of_their_class(name: str, theirs: str, values: dict):
    """Transformers builds the model from the published sizes, not from an export's."""
    torch, transformers = require("torch"), require("transformers")
    model_class = getattr(transformers, theirs)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    assert model.num_parameters() == COUNTS[name]
    assert_same_shapes(model, name)


@pytest.mark.parametrize("name", HUB)
def test_a_preset_is_the_model_of_the_published_config(name: str):
    ours = load_config(name, {}).resolved().model
    theirs = Interchange.from_config(HUB[name]).config
    differing = {key for key, value in vars(ours).items() if value != getattr(theirs, key)}
    assert differing <= OF_TRAINING | EXTENDED.get(name, set())


def assert_same_shapes(model: Any, name: str) -> None:
    config = load_config(name, {}).resolved(32_000)
    shapes = Interchange(config.model, config.data.segment_length).shapes
    named = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    named |= {key: tuple(buffer.shape) for key, buffer in model.named_buffers() if key.endswith("correction_bias")}
    if config.model.num_experts and type(model).__name__ != "GptOssForCausalLM":
        named = one_by_one(named, type(model).__name__ == "MixtralForCausalLM")
    if type(model).__name__ == "GPTNeoXForCausalLM":  # in files its unembedding has the older name
        named["embed_out.weight"] = named.pop("lm_head.weight")
    assert shapes == named


def one_by_one(named: dict[str, tuple[int, ...]], of_mixtral: bool) -> dict[str, tuple[int, ...]]:
    """Shapes by the names on disk, where each expert has its own matrices; in memory they are together."""
    gate, up, down = ("w1", "w3", "w2") if of_mixtral else ("gate_proj", "up_proj", "down_proj")
    apart: dict[str, tuple[int, ...]] = {}
    for key, shape in named.items():
        key = key.replace(".mlp.", ".block_sparse_moe.") if of_mixtral else key
        block, _, name = key.rpartition(".experts.")
        if not block:
            apart[key] = shape
            continue
        E, outputs, inputs = shape
        for expert in range(E):
            if name == "down_proj":
                apart[f"{block}.experts.{expert}.{down}.weight"] = (outputs, inputs)
            else:
                half = (outputs // 2, inputs)
                apart |= {f"{block}.experts.{expert}.{part}.weight": half for part in (gate, up)}
    return apart


@pytest.mark.parametrize("name", COUNTS)
def test_every_presets_export_has_the_names_and_shapes_of_its_class_at_full_size(name: str):
    torch, transformers = require("torch"), require("transformers")
    config = load_config(name, {}).resolved(32_000)
    values = Interchange(config.model, config.data.segment_length).export_config(bos_id=0, eos_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values))
    assert [type(model).__name__] == values["architectures"]
    assert_same_shapes(model, name)
    if name in HUB:
        assert values["architectures"] == HUB[name]["architectures"]
        assert model.num_parameters() == COUNTS[name]


# The values of the published config.json that decide what a model of these shapes computes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2_124m": {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "n_positions": 1024}
    | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1),
    "llama2_7b": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 4096},
    "llama3_8b": {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 8192},
    "qwen3_0_6b": {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_attention_heads": 16},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_compute_what_the_published_model_does(name: str):
    config = load_config(name, {}).resolved(32_000)
    values = Interchange(config.model, config.data.segment_length).export_config(bos_id=0, eos_id=0)
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


# Tokens of a batch and of all; the schedule and its peak, warm-up and final share; β₁, β₂, ε, decay and clipping.
RECIPES = {
    "vaswani_base": (25_000, None, ("inverse_sqrt", 7e-4, 4000, None), (0.9, 0.98, 1e-9, 0.0, 0.0)),
    "gpt2_124m": (0.5e6, None, ("cosine", 6e-4, 2000, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "gpt3_175b": (3.2e6, 300e9, ("cosine", 0.6e-4, 5760, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "llama2_7b": (4e6, 2e12, ("cosine", 3e-4, 2000, 0.1), (0.9, 0.95, 1e-5, 0.1, 1.0)),
    "llama3_8b": (8e6, 15e12, ("cosine", 3e-4, 8000, 0.01), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "pythia_160m": (2e6, 300e9, ("cosine", 6e-4, 1430, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "olmo2_1b": (2e6, 5e12, ("cosine", 4e-4, 4000, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "smollm3_3b": (2.36e6, 11.1e12, ("wsd", 2e-4, 2000, 0.0), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "olmo3_7b": (4e6, 5e12, ("cosine", 3e-4, 2000, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "olmoe_1b_7b": (4.2e6, 5.13e12, ("cosine", 4e-4, 2500, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "deepseek_v2_lite": (18.9e6, 5.7e12, ("wsd", 4.2e-4, 2000, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "deepseek_v3": (62.9e6, 14.8e12, ("wsd", 2.2e-4, 2000, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
    "kimi_k2": (67.1e6, 15.5e12, ("wsd", 2e-4, 500, 0.1), (0.9, 0.95, 1e-8, 0.1, 1.0)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipes_are_those_of_their_papers(name: str):
    config = load_config(name, {}).resolved(50_257)
    tokens, of_all, (schedule, peak, warmup, final), (beta1, beta2, epsilon, decay, clip) = RECIPES[name]
    length, optimizer = config.data.segment_length, config.optimizer
    assert config.train.batch_size * length == pytest.approx(tokens, rel=0.06)
    if of_all:
        rows = sum(batch_size(config, step) for step in range(config.train.num_steps))
        assert rows * length == pytest.approx(of_all, rel=0.02)
    assert (optimizer.name, optimizer.schedule) == ("muon" if name == "kimi_k2" else "adamw", schedule)
    assert optimizer.learning_rate == pytest.approx(peak, rel=0.01)
    assert optimizer.steps_of_warmup(config.train.num_steps) in (warmup, warmup - 1)
    assert final in (None, optimizer.final_fraction)
    actual = (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.weight_decay, optimizer.clip_norm)
    assert actual == (beta1, beta2, epsilon, decay, clip)


# The published recipes, at a size that a test can train.
SHRUNK = {
    "model.num_layers": 2, "model.model_dim": 32, "model.num_heads": 4, "model.feedforward_dim": 128,
    "model.vocab_size": "none", "data.segment_length": 32, "data.validation_fraction": 0,
    "tokenizer.vocab_size": 512, "train.batch_size": 16, "train.accumulation_steps": 2, "train.log_every_steps": 1,
    "checkpoint.every_steps": 6, "checkpoint.export": "false", "optimizer.warmup_steps": 2,
}  # fmt: skip


STEPS = 12


@pytest.mark.parametrize("name", ["gpt2_124m", "vaswani_base", "gpt3_175b"])
def test_a_published_recipe_trains_resumes_to_the_bit_and_gives_the_same_logits_in_transformers(
    name: str, tmp_path: Path, capsys
):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    changes = SHRUNK | {"data.corpus": corpus, "train.num_steps": STEPS, "optimizer.learning_rate": 1e-2}
    if name == "gpt3_175b":
        changes |= {"train.batch_ramp_start": 8, "train.batch_ramp_steps": 8}
    if name == "gpt2_124m":
        changes |= {"train.ema_decay": 0.9}

    def run(folder: Path) -> int:
        fields = changes | {"train.run_dir": folder}
        return here("pretrain", f"--config={name}", *(f"--config.{key}={value}" for key, value in fields.items()))

    assert run(tmp_path / "straight") == 0
    losses = [record["loss"] for record in metrics(tmp_path / "straight")]
    assert min(losses[-3:]) < losses[0] - 0.3
    assert here("export", tmp_path / "straight", "--format=hf", f"--to={tmp_path / 'export'}") == 0
    capsys.readouterr()
    assert_same_logits(tmp_path / "straight", tmp_path / "export")

    if name == "gpt2_124m":  # the others have nothing of their own to resume
        # As if it had been killed between its two checkpoints.
        shutil.copytree(tmp_path / "straight", tmp_path / "killed")
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(STEPS))
        assert run(tmp_path / "killed") == 0
        assert [record["loss"] for record in metrics(tmp_path / "killed")] == losses
        sums = [
            json.loads((tmp_path / run / "checkpoints" / str(STEPS) / "progress" / "metadata").read_text())["checksums"]
            for run in ("straight", "killed")
        ]
        assert sums[0] == sums[1]
