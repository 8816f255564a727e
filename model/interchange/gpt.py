"""OpenAI's GPT-2 and its first GPT in Transformers: a table of positions, LayerNorm, biases, matrices as [in, out].

GPT-2 (Radford et al. 2019) is pre-norm; the first (Radford et al. 2018) is post-norm, as Vaswani et al. 2017.
"""

from dataclasses import replace

from model.interchange.config_keys import ALIASES, ConfigKey
from model.interchange.family import ANY, Family
from model.interchange.tensors import Tensor, same_layout, torch_linear

# The name that both give GPT-2's approximation; "gelu" is the exact one in GPT-2 and the approximation in the first.
GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "relu2": "relu2", "silu": "silu"}
GPT1_ACTIVATIONS = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
SIZES = (
    ConfigKey("vocab_size", "vocab_size", int),
    ConfigKey("n_embd", "model_dim", int),
    ConfigKey("n_layer", "num_layers", int),
    ConfigKey("n_head", "num_heads", int),
    ConfigKey("layer_norm_epsilon", "norm_epsilon", float, 1e-5),
    ConfigKey("embd_pdrop", "embedding_dropout", float, 0.1),
    ConfigKey("attn_pdrop", "attention_dropout", float, 0.1),
    ConfigKey("resid_pdrop", "residual_dropout", float, 0.1),
    ConfigKey("tie_word_embeddings", "tie_embeddings", bool, True),
)
# Keys of a class with another head.
SUMMARY = tuple(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"))


def tensors(token_table: str, position_table: str) -> tuple[Tensor, ...]:
    """Returns the tensors that both classes have, given the names of their tables."""
    layer = "transformer.h.{layer}."
    heads = [f"blocks.attention.{name}" for name in ("query", "key", "value")]
    weights = {
        "attn.c_proj": "blocks.attention.output",
        "mlp.c_fc": "blocks.feedforward.up",
        "mlp.c_proj": "blocks.feedforward.down",
    }
    return (
        same_layout(f"transformer.{token_table}.weight", "embedding.table"),
        same_layout(f"transformer.{position_table}.weight", "position.table"),
        same_layout(layer + "ln_1.weight", "blocks.attention_norm.scale"),
        same_layout(layer + "ln_1.bias", "blocks.attention_norm.bias"),
        same_layout(layer + "ln_2.weight", "blocks.feedforward_norm.scale"),
        same_layout(layer + "ln_2.bias", "blocks.feedforward_norm.bias"),
        same_layout(layer + "attn.c_attn.weight", *heads),
        same_layout(layer + "attn.c_attn.bias", *(f"{name}_bias" for name in heads)),
        *(same_layout(f"{layer}{name}.weight", parameter) for name, parameter in weights.items()),
        *(same_layout(f"{layer}{name}.bias", f"{parameter}_bias") for name, parameter in weights.items()),
        same_layout("transformer.ln_f.weight", "norm.scale"),
        same_layout("transformer.ln_f.bias", "norm.bias"),
        torch_linear("lm_head.weight", "unembedding.matrix"),
    )


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys=(
        *SIZES,
        # Null means four times the model width, as in our config.
        ConfigKey("n_inner", "feedforward_dim", int | None),
        ConfigKey("activation_function", "activation", str, "gelu_new", GPT2_ACTIVATIONS, ALIASES),
    ),
    tensors=tensors("wte", "wpe"),
    context=ConfigKey("n_positions", "max_positions", int, 1024),
    choices={
        "position": ("learned", "sinusoidal", "none"),
        "norm": ("layernorm",),
        "norm_placement": ("pre",),
        "gated": (False,),
        "qk_norm": (False,),
        "sliding_window": (None,),
        "norm_bias": ANY,
    },
    limits={
        "num_kv_heads": lambda config: config.num_kv_heads == config.num_heads,
        "head_dim": lambda config: config.head_dim * config.num_heads == config.model_dim,
        "rope_dim": ANY,
        "attention_output_bias": ANY,
    },
    always={
        "position": "learned",
        "attention_bias": True,
        "attention_output_bias": True,
        "feedforward_bias": True,
        "norm_bias": True,
    },
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    # Older files hold masks with the weights.
    ignored=(".attn.bias", ".attn.masked_bias"),
    # It also upcasts attention of 16 bits, which here is always in float32.
    without_effect=(*SUMMARY, "reorder_and_upcast_attn"),
)
GPT1 = replace(
    GPT2,
    model_type="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    keys=(*SIZES, ConfigKey("afn", "activation", str, "gelu", GPT1_ACTIVATIONS, {"swish": "silu"})),
    tensors=tensors("tokens_embed", "positions_embed"),
    context=GPT2.context._replace(default=512),
    choices={**GPT2.choices, "norm_placement": ("post",)},
    limits={**GPT2.limits, "feedforward_dim": lambda config: config.feedforward_dim == 4 * config.model_dim},
    required={},
    without_effect=SUMMARY,
)
