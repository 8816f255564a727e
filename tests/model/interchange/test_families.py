"""Random small models of every class of Transformers come in, compute the same, and go out as they came (C7)."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ResolvedModelConfig
from model.decoder import Decoder
from model.fields import EXPORT_CLASSES
from model.generation.generator import Generator
from model.generation.sampling import Sampling
from model.interchange.huggingface import FAMILIES, Interchange
from model.interchange.tensors import nested_weights, reader_of
from tests.peers import require

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
KV = {"num_key_value_heads": 2}
FOUR = {"num_hidden_layers": 4}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 64}
FULL, WINDOW = "full_attention", "sliding_attention"
YARN = {"rope_type": "yarn", "rope_theta": 7e3, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 7e3, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# Configs of each class, with what makes it differ from others, the last of them most. A missing size is that of `SIZES`
# and `KV`.
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"head_dim": 16}, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}],
    "mistral": [{"sliding_window": None, "head_dim": 16}, {"sliding_window": 5}],
    "gemma": [{"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}],
    "qwen3": [
        {"head_dim": 16},
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ],
    "gpt2": [GPT, GPT | {"n_inner": 40, "activation_function": "relu"}],
    "openai-gpt": [GPT],
    "qwen2": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
        FOUR | {"use_sliding_window": True, "sliding_window": 5, "layer_types": [WINDOW, FULL, FULL, WINDOW]},
    ],
    "ministral": [
        {"sliding_window": 6, "head_dim": 16},
        {"sliding_window": 5, "head_dim": 8, "layer_types": [FULL] * 2},
        FOUR | {"sliding_window": 5, "head_dim": 8, "layer_types": [FULL, WINDOW, WINDOW, FULL]},
    ],
    "smollm3": [FOUR, FOUR | {"no_rope_layers": [0, 1, 1, 1], "attention_bias": True, "tie_word_embeddings": False}],
    "phi3": [{}, {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}],
    "granite": [
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"embedding_multiplier": 4.0, "logits_scaling": 8.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25},
    ],
    "glm4": [{"head_dim": 16}, {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True}],
    "olmo2": [{}, {"num_key_value_heads": 4, "attention_bias": True, "rope_parameters": YARN}],
    "olmo3": [
        FOUR | {"sliding_window": 5},
        FOUR
        | {
            "sliding_window": 4,
            "layer_types": [FULL, WINDOW, WINDOW, WINDOW],
            "rope_parameters": {FULL: YARN, WINDOW: {"rope_type": "default", "rope_theta": 7e3}},
        },
    ],
    "gemma2": [
        {"head_dim": 16, "layer_types": [FULL] * 2},
        {"head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": 1.0},
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 20},
    ],
    "gemma3_text": [
        {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
        {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": [WINDOW, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                WINDOW: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ],
    "gpt_neox": [
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 7e3, "partial_rotary_factor": 0.5},
        },
        {},
    ],
    "stablelm": [{}, {"use_parallel_residual": True, "use_qkv_bias": True, "tie_word_embeddings": True}],
    "starcoder2": [{}, {"sliding_window": 5, "use_bias": False, "tie_word_embeddings": False}],
    "cohere2": [
        FOUR | {"sliding_window": 5},
        {"layer_types": [FULL, WINDOW], "sliding_window": 4, "logit_scale": 2.0, "head_dim": 16},
    ],
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 7.0]}
LONGROPE |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 8}
CASES["phi3"] += [
    # The text is longer than the original context, and so is the prompt.
    {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8, "max_position_embeddings": 64},
    {
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 32, "attention_factor": 1.2},
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 64,
    },
]
DEEPSEEK = {"first_k_dense_replace": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"qk_nope_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 8}
YARN_SCALES = YARN | {"mscale": 0.5, "mscale_all_dim": 0.7}
CASES["deepseek_v3"] = [
    DEEPSEEK | {"q_lora_rank": 12},
    DEEPSEEK | {"q_lora_rank": None, "rope_parameters": YARN_SCALES},
]
CASES["deepseek_v2"] = [
    DEEPSEEK | {"q_lora_rank": 12, "rope_parameters": YARN | {"mscale_all_dim": 0.7}},
    DEEPSEEK | {"q_lora_rank": None, "rope_parameters": YARN | {"attention_factor": 1.5}},
]
# One dense layer, two groups of four experts.
LATENT_EXPERTS = DEEPSEEK | {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 8}
LATENT_EXPERTS |= {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1, "n_shared_experts": 2}
CASES["deepseek_v3"] += [
    LATENT_EXPERTS | {"q_lora_rank": None, "n_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0},
    LATENT_EXPERTS | {"q_lora_rank": 12, "rope_parameters": YARN_SCALES | {"beta_fast": 1.0, "beta_slow": 1.0}},
]
CASES["deepseek_v2"] += [
    LATENT_EXPERTS | {"q_lora_rank": None, "routed_scaling_factor": 1.5, "rope_parameters": YARN_SCALES},
    LATENT_EXPERTS | {"q_lora_rank": 12, "topk_method": "group_limited_greedy"},
]
EXPERTS = {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2}
CASES["mixtral"] = [
    {"num_hidden_layers": 2, "num_local_experts": 4},
    {"num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": 5, "num_experts_per_tok": 3, "head_dim": 16},
]
CASES["olmoe"] = [EXPERTS, EXPERTS | {"norm_topk_prob": True, "attention_bias": True, "rope_parameters": YARN}]
CASES["qwen3_moe"] = [
    EXPERTS | {"norm_topk_prob": True, "head_dim": 16, "moe_intermediate_size": 24},
    {
        **EXPERTS | {"num_hidden_layers": 4, "moe_intermediate_size": 40, "decoder_sparse_step": 2},
        **{"mlp_only_layers": [3], "use_sliding_window": True, "sliding_window": 5, "attention_bias": True},
    },
]
CASES["qwen2_moe"] = [
    EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    {
        **EXPERTS | {"num_hidden_layers": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
        **{"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        "qkv_bias": False,
    },
]
GLM = {"num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES["glm4_moe"] = [
    GLM | {"head_dim": 8},
    {
        **GLM | {"attention_bias": True, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "head_dim": 16},
        **{"routed_scaling_factor": 2.5, "n_shared_experts": 2, "first_k_dense_replace": 2},
    },
]
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5}
CASES["gpt_oss"] = [
    GPT_OSS | {"num_hidden_layers": 2, "attention_bias": False, "layer_types": [FULL] * 2, "rope_parameters": YARN},
    GPT_OSS | {"num_hidden_layers": 2},
]
# Without rows of the embedding that are zeroed.
OTHERS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}


class Foreign(NamedTuple):
    """A model of Transformers, and what `save_pretrained` wrote of it."""

    model: Any
    hf_config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def foreign(model_type: str, case: dict[str, Any], folder: Path) -> Foreign:
    torch, transformers = require("torch"), require("transformers")
    sizes = {} if case.keys() >= GPT.keys() else SIZES | ({} if model_type == "gpt_neox" else KV)
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **OTHERS, **case})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases that are not all the same, and outputs that differ.
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    from safetensors.numpy import load_file

    return Foreign(model, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("model_type", "case"), [(name, case) for name, cases in CASES.items() for case in cases], ids=lambda x: str(x)[:60]
)
def test_a_model_of_transformers_computes_the_same_here_and_goes_out_as_it_came(
    model_type: str, case: dict, tmp_path: Path
):
    torch = require("torch")
    theirs = foreign(model_type, case, tmp_path)
    interchange = Interchange.from_config(theirs.hf_config)
    assert interchange.family.model_type == model_type
    interchange.check_tensors(theirs.tensors, theirs.tensors.__getitem__)
    config = interchange.config
    read = interchange.import_reader(theirs.tensors.__getitem__)
    weights = jax.tree.map(jnp.asarray, nested_weights(config, read))

    tokens = np.random.default_rng(0).integers(0, 60, (2, 24))
    with torch.no_grad():
        expected = theirs.model(torch.tensor(tokens)).logits.numpy()
    actual = logits_of(config, weights, tokens)
    assert np.abs(expected).max() > 0.1
    assert np.abs(actual - expected).max() <= 1e-4

    # Out again: the same names and bits, and a config that Transformers reads as the same model.
    again = Interchange(config, interchange.context)
    assert again.family.model_type == model_type
    out = dict(again.export_tensors(reader_of(weights)))
    assert out.keys() == theirs.tensors.keys()
    for name, array in out.items():
        assert np.array_equal(array, theirs.tensors[name]), name
    assert Interchange.from_config(again.export_config(0, 1)).config == config
    assert_read_alike(again.export_config(0, 1), theirs, tokens, expected)

    # The programs of generation take most of a case's time. How longrope rotates follows from what is generated.
    if case is not CASES[model_type][-1] and config.rope_scaling != "longrope":
        return
    greedy = generated(config, weights, [int(token) for token in tokens[0, :9]])
    with torch.no_grad():
        prompt = torch.tensor(tokens[:1, :9])
        options = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "pad_token_id": 0}
        whole = theirs.model.generate(prompt, max_new_tokens=14, do_sample=False, **options)
    assert greedy == whole[0, 9:].tolist()


def logits_of(config: ResolvedModelConfig, weights: Any, tokens: np.ndarray) -> np.ndarray:
    @jax.jit
    def logits(weights: Any, tokens: jax.Array) -> jax.Array:
        decoder = Decoder(config, weights)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))

    return np.asarray(logits(weights, jnp.asarray(tokens, jnp.int32)))[..., : config.vocab_size]


def assert_read_alike(hf_config: dict[str, Any], theirs: Foreign, tokens: np.ndarray, expected: np.ndarray) -> None:
    """Builds the model of an exported config in Transformers, with the tensors as they came."""
    torch, transformers = require("torch"), require("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config)).eval()
    model.load_state_dict(theirs.model.state_dict())
    with torch.no_grad():
        assert np.abs(model(torch.tensor(tokens)).logits.numpy() - expected).max() <= 1e-5


def generated(config: ResolvedModelConfig, weights: Any, prompt: list[int]) -> list[int]:
    tokens: list[int] = []
    generator = Generator(config, weights, context=64, eos_id=-1)
    for delta in generator([prompt], max_new_tokens=14, sampling=Sampling(top_k=1)):
        tokens += delta.tokens
    return tokens


def test_every_class_has_a_case_and_a_name():
    assert tuple(family.model_type for family in FAMILIES) == EXPORT_CLASSES
    assert CASES.keys() == set(EXPORT_CLASSES)
