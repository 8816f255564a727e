"""Our weights as the tensors of independent implementations, and those implementations themselves, for parity tests.

The map of weights is linear and one to one, so gradients go through it too.
"""

from typing import Any

import numpy as np

from model.config import ModelConfig
from model.interchange import llama
from model.parameters import flattened
from model.position import sinusoids
from tests.peers import require
from tests.small import small_model

GPT = {
    "position": "learned",
    "max_positions": 16,
    "activation": "gelu_tanh",
    "gated": False,
    "num_kv_heads": 4,
    "attention_bias": True,
    "feedforward_bias": True,
    "norm": "layernorm",
    "feedforward_dim": 128,
    "tie_embeddings": True,
}
MODELS = {
    "llama": small_model(),
    "qwen3": small_model(qk_norm=True, tie_embeddings=True, head_dim=16),
    "gpt2": small_model(**GPT),
    "post-norm": small_model(**GPT, norm_placement="post"),
    "vaswani": small_model(
        **GPT | {"position": "sinusoidal", "max_positions": None, "activation": "relu", "attention_bias": False},
        norm_placement="post",
    ),
}


def build(name: str) -> Any:
    """Transformers' model of this name."""
    transformers, config = require("transformers"), MODELS[name]
    if name in ("llama", "qwen3"):
        values = llama.config_to_theirs(config, 16, eos_id=0)
        return getattr(transformers, values["architectures"][0])(getattr(
            transformers, values["architectures"][0].replace("ForCausalLM", "Config"))(**values))  # fmt: skip
    sizes = {"n_positions": 16, "n_embd": config.model_dim, "n_layer": config.num_layers, "n_head": config.num_heads}
    sizes |= {"vocab_size": config.vocab_size, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes |= {"layer_norm_epsilon": config.norm_epsilon, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_inner=config.feedforward_dim, **sizes))
    # The first GPT is post-norm (Radford et al. 2018). Its inner width is always 4 D.
    afn = "relu" if config.activation == "relu" else "gelu"
    return transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(afn=afn, **sizes))


def tensors(name: str, weights: Any) -> dict[str, np.ndarray]:
    """Nested weights, or their gradients, under Transformers' names and in its layouts."""
    config = MODELS[name]
    if name in ("llama", "qwen3"):
        return llama.to_theirs(config, weights)
    return gpt_tensors(config, {name: np.asarray(array) for name, array in flattened(weights).items()})


def gpt_tensors(config: ModelConfig, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of GPT-2, or of the first GPT where the norms come last; both keep weights as [in, out]."""
    first = config.norm_placement == "post"
    tokens, positions = ("tokens_embed", "positions_embed") if first else ("wte", "wpe")
    table = ours.get("position.table")
    theirs = {
        f"transformer.{tokens}.weight": ours["embedding.table"][: config.vocab_size],
        f"transformer.{positions}.weight": fixed_positions(config) if table is None else table,
    }
    if not first:
        theirs |= {f"transformer.ln_f.{name}": ours[f"norm.{theirs_}"] for theirs_, name in NORM.items()}
    D = config.model_dim
    for i in range(config.num_layers):
        block = {name.removeprefix("blocks."): x[i] for name, x in ours.items() if name.startswith("blocks.")}
        to = f"transformer.h.{i}"
        for ours_, norm in (("attention_norm", "ln_1"), ("feedforward_norm", "ln_2")):
            theirs |= {f"{to}.{norm}.{name}": block[f"{ours_}.{part}"] for part, name in NORM.items()}
        qkv = [f"attention.{name}" for name in ("query", "key", "value")]
        theirs[f"{to}.attn.c_attn.weight"] = np.concatenate([block[name].reshape(D, D) for name in qkv], axis=1)
        theirs[f"{to}.attn.c_proj.weight"] = block["attention.output"].reshape(D, D)
        if config.attention_bias:
            theirs[f"{to}.attn.c_attn.bias"] = np.concatenate([block[f"{name}_bias"].reshape(D) for name in qkv])
            theirs[f"{to}.attn.c_proj.bias"] = block["attention.output_bias"]
        for ours_, name in (("up", "c_fc"), ("down", "c_proj")):
            theirs[f"{to}.mlp.{name}.weight"] = block[f"feedforward.{ours_}"]
            theirs[f"{to}.mlp.{name}.bias"] = block[f"feedforward.{ours_}_bias"]
    return theirs


NORM = {"scale": "weight", "bias": "bias"}


def fixed_positions(config: ModelConfig) -> np.ndarray:
    """The paper's sinusoids as a table [16, D]."""
    return np.asarray(sinusoids(np.arange(16)[None], config.model_dim))[0]


def load(name: str, weights: Any) -> tuple[Any, dict[str, Any]]:
    """(Transformers' model with these weights, its parameters that are trained, by name)."""
    torch, model, values = require("torch"), build(name), tensors(name, weights)
    parameters = dict(model.named_parameters())
    assert values.keys() <= parameters.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            # What our model does not have is zero there, and stays so.
            value = values.get(key, np.zeros(parameter.shape))
            parameter.copy_(torch.tensor(np.asarray(value), dtype=torch.float32))
    fixed = parameters.keys() - values.keys()
    if name == "vaswani":
        fixed.add("transformer.positions_embed.weight")
    return model, {key: parameter for key, parameter in parameters.items() if key not in fixed}
