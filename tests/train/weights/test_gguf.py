"""llama.cpp computes what we compute from a GGUF file, and finds the same tokens in a text (C7)."""

import copy
import difflib
import functools
import shutil
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import InputError, StorageError
from data.files.atomic import unfinished
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.to_gguf import gguf_metadata
from data.tokenizer.tokenizer import FIM_TOKENS, Tokenizer
from data.tokenizer.training import train_tokenizer
from model.config import ModelConfig
from model.decoder import Decoder
from model.interchange.gguf_architectures import ARCHITECTURES
from model.interchange.huggingface import Interchange
from model.interchange.tensors import nested_weights, reader_of
from model.parameters import parameter_table
from model.trees import nested
from tests.data import others
from tests.data.texts import NASTY, code
from tests.llama_cpp import LlamaCpp
from tests.model.interchange.test_families import FULL, KV, LLAMA3, WINDOW, foreign
from tests.peers import require
from tests.small import small_model
from train.weights.gguf import write_gguf
from train.weights.weight_source import WeightSource

CONTEXT = 32
GPT: dict[str, Any] = {
    "position": "learned",
    "max_positions": CONTEXT,
    "num_kv_heads": 4,
    "activation": "gelu_tanh",
    "gated": False,
    "attention_bias": True,
    "feedforward_bias": True,
    "norm": "layernorm",
    "tie_embeddings": True,
}
LLAMA3_FIELDS: dict[str, Any] = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 16}
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 64}
GEMMA: dict[str, Any] = {"scale_embeddings": True, "tie_embeddings": True, "activation": "gelu_tanh", "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3, tied": LLAMA3_FIELDS | {"tie_embeddings": True},
    "biases, other heads": {"attention_bias": True, "feedforward_bias": True, "head_dim": 32},
    "linear": {"rope_scaling": "linear", "rope_factor": 4.0},
    "yarn": YARN,
    "a window over all": {"sliding_window": CONTEXT},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "qwen3, yarn, tied": YARN | {"qk_norm": True, "tie_embeddings": True},
    "gemma": GEMMA,
    "gpt2": GPT,
    "gpt2, untied": GPT | {"tie_embeddings": False},
    "sinusoidal, no biases": GPT
    | {"position": "sinusoidal", "max_positions": None, "attention_bias": False, "feedforward_bias": False},
    "scaled": {"scale_embeddings": True, "position": "none"} | {k: v for k, v in GPT.items() if "posi" not in k},
}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
FOUR = {"num_hidden_layers": 4}
PLAIN = {"rope_type": "default", "rope_theta": 7e3}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 7e3}
HF_YARN = {"rope_type": "yarn", "rope_theta": 7e3, "factor": 4.0, "original_max_position_embeddings": 16}
OLMO3 = {"sliding_window": 5}
GEMMA2 = {"sliding_window": 5, "head_dim": 32, "query_pre_attn_scalar": 32}
# As deep as 27B; norms with a large epsilon don't amplify the rounding of GELU in each layer.
GEMMA_27B = GEMMA2 | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0, "rms_norm_eps": 1.0}
NEOX = {"hidden_act": "gelu_new"}
GLM = {"n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
EXPERTS = {"num_hidden_layers": 2, "num_experts": 6, "num_experts_per_tok": 2}
# Three groups of two experts behind a dense layer.
LATENT = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 6, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_shared_experts": 2, "n_group": 3, "topk_group": 2}
V2 = LATENT | {"q_lora_rank": None, "routed_scaling_factor": 1.5}
V3 = LATENT | {"q_lora_rank": 20}
SCALES = HF_YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
GEMMA2_FIELDS = GEMMA | {
    **{"export_as": "gemma2", "norm_placement": "both", "sliding_window": 5, "layer_pattern": "SF"},
    **{"attention_softcap": 50.0, "logit_softcap": 30.0},
}
GEMMA3_FIELDS = GEMMA2_FIELDS | {"export_as": "gemma3_text", "qk_norm": True, "attention_softcap": None}
LINEAR_FIELDS = {"rope_scaling": "linear", "rope_factor": 8.0}
OLMO3_FIELDS = {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads", "sliding_window": 5}
QWEN2_FIELDS = {"attention_bias": True, "attention_output_bias": False}
NEOX_FIELDS: dict[str, Any] = {
    **{"norm": "layernorm", "gated": False, "num_kv_heads": 4, "attention_bias": True, "feedforward_bias": True},
    **{"block": "parallel", "activation": "gelu_tanh"},
}
COHERE2_FIELDS: dict[str, Any] = {
    **{"norm": "layernorm", "norm_bias": False, "block": "parallel_one_norm", "tie_embeddings": True},
    **{"sliding_window": 5, "layer_pattern": "SN"},
}
LATENT_FIELDS: dict[str, Any] = {
    **{"kv_latent_dim": 24, "query_latent_dim": 20, "head_dim": 24, "rope_dim": 8, "num_kv_heads": 4},
    **{"norm_epsilon": 1e-6, "num_experts": 4, "shared_expert_dim": 96, "router_normalize": False},
}
# Configs of classes in Transformers, beside `SIZES` and `KV`.
CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("ministral", {"head_dim": 32, "layer_types": [FULL] * 2}),
    ("qwen2", {"rope_parameters": HF_YARN}),
    ("qwen2", FOUR | {"tie_word_embeddings": True}),
    ("smollm3", {"num_hidden_layers": 5}),
    ("smollm3", FOUR | {"head_dim": 32, "tie_word_embeddings": False, "rope_parameters": LINEAR}),
    ("phi3", {}),
    ("phi3", {"tie_word_embeddings": True, "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
    (
        "granite",
        {"embedding_multiplier": 4.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.5},
    ),
    (
        "granite",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    ("glm4", {"head_dim": 32}),
    ("glm4", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    ("olmo2", {"rope_parameters": HF_YARN}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("olmo3", OLMO3 | {"num_hidden_layers": 5}),
    (
        "olmo3",
        OLMO3
        | FOUR
        | {"layer_types": [FULL, WINDOW, WINDOW, WINDOW], "rope_parameters": {FULL: HF_YARN, WINDOW: PLAIN}},
    ),
    ("olmo3", OLMO3 | {"layer_types": [WINDOW] * 2}),
    ("gemma2", GEMMA2),
    ("gemma2", GEMMA2 | {"layer_types": [FULL, WINDOW], "rope_parameters": LINEAR}),
    ("gemma2", GEMMA_27B | {"num_hidden_layers": 46, "attn_logit_softcapping": 3.0}),
    ("gemma3_text", GEMMA2 | {"num_hidden_layers": 7}),
    (
        "gemma3_text",
        GEMMA2
        | {
            "layer_types": [WINDOW, FULL],
            "tie_word_embeddings": False,
            "rope_parameters": {FULL: HF_YARN, WINDOW: PLAIN | {"rope_theta": 1e3}},
        },
    ),
    ("gemma3_text", GEMMA2 | {"layer_types": [FULL] * 2, "rope_parameters": {FULL: LINEAR, WINDOW: PLAIN}}),
    ("gemma3_text", GEMMA_27B | {"num_hidden_layers": 62}),
    ("gpt_neox", NEOX | {"tie_word_embeddings": True}),
    ("gpt_neox", NEOX | {"use_parallel_residual": False, "rope_parameters": HF_YARN | {"partial_rotary_factor": 0.5}}),
    ("stablelm", {"tie_word_embeddings": True}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("starcoder2", {}),
    ("starcoder2", {"tie_word_embeddings": False}),
    ("cohere2", {"sliding_window": 5, "num_hidden_layers": 5}),
    ("cohere2", {"sliding_window": 5, "layer_types": [FULL, WINDOW], "logit_scale": 2.0}),
    ("mixtral", EXPERTS | {"num_local_experts": 4}),
    ("olmoe", EXPERTS | {"num_key_value_heads": 4, "rope_parameters": HF_YARN}),
    ("qwen3_moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 32, "moe_intermediate_size": 32}),
    ("qwen2_moe", EXPERTS | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}),
    ("glm4_moe", EXPERTS | GLM | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True}),
    ("deepseek_v2", V2),
    ("deepseek_v2", V2 | {"q_lora_rank": 20, "n_shared_experts": 1, "rope_parameters": SCALES}),
    ("deepseek_v2", V2 | {"first_k_dense_replace": 0, "rope_parameters": HF_YARN | {"attention_factor": 1.0}}),
    ("deepseek_v2", V2 | {"num_hidden_layers": 27, "rope_parameters": HF_YARN}),
    ("deepseek_v3", V3),
    ("deepseek_v3", V3 | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "rope_parameters": SCALES}),
    ("deepseek_v3", V3 | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": False}),
    ("deepseek_v3", V3 | {"topk_group": 3, "tie_word_embeddings": True, "rope_parameters": SCALES | {"mscale": 2.0}}),
    ("deepseek_v3", V3 | {"first_k_dense_replace": 3}),
    ("gpt_oss", EXPERTS | {"num_local_experts": 4, "head_dim": 32, "sliding_window": 5, "rope_parameters": PLAIN}),
]
# The largest difference of log-probabilities in nats, which spread by about one. In float32 it comes from the order of
# sums, and for GELU from the half-precision table in llama.cpp.
CLOSE = {"f32": 1e-4, "f16": 0.01, "bf16": 0.05, "q8_0": 0.15}
GELU = 0.004


@pytest.fixture(scope="module", autouse=True)
def llama_cpp():
    require("gguf")
    require("xllamacpp")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    learned = train_tokenizer(code()[:40], 800, tmp_path_factory.mktemp("ours"))
    assert isinstance(learned, SentencePieceTokenizer)
    return learned


def model_of(tokenizer: Tokenizer, changes: dict[str, Any]) -> ModelConfig:
    sizes = {"model_dim": 64, "feedforward_dim": 96, "vocab_size": tokenizer.vocab_size, "norm_epsilon": 0.01}
    return small_model(**sizes | changes)


def weights_of(config: ModelConfig) -> Any:
    """Returns random weights whose log-probabilities spread by about one nat."""
    random = np.random.default_rng(0)
    drawn = {name: random.normal(0, 0.1, parameter.shape) for name, parameter in parameter_table(config).items()}
    return nested({name: (name.endswith("scale") + x).astype(np.float32) for name, x in drawn.items()})


def write(file: Path, config: ModelConfig, weights: Any, tokenizer: Tokenizer, dtype: str = "f32") -> Path:
    write_gguf(file, WeightSource(config, CONTEXT, tokenizer, reader_of(weights)), dtype)
    return file


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(config: ModelConfig, weights: Any, tokens_T: jax.Array) -> jax.Array:
    """Returns our log-probabilities of the next token, float32 [T, V]."""
    decoder, tokens_BT = Decoder(config, weights), tokens_T[None]
    x_BTD = decoder(tokens_BT, jnp.arange(len(tokens_T))[None], jnp.ones_like(tokens_BT))
    return jax.nn.log_softmax(decoder.logits(x_BTD)[0, :, : config.vocab_size])


def agree(config: ModelConfig, weights: Any, file: Path, close: float) -> None:
    """Asserts equal greedy tokens wherever the best two log-probabilities differ by more than twice the rounding."""
    prompt = [1, *np.random.default_rng(0).integers(3, config.vocab_size, 11).tolist()]
    tokens, theirs = LlamaCpp(file, CONTEXT).greedy(prompt, CONTEXT - len(prompt) - 1, config.vocab_size)
    assert len(tokens) > 4 or tokens[-1] == 1
    seen = np.array([*prompt, *tokens, *[0] * CONTEXT][:CONTEXT])
    ours = np.asarray(log_probabilities(config, weights, seen))[len(prompt) - 1 :][: len(tokens)]
    given = ~np.isnan(theirs).all(axis=1)
    assert given.sum() > 4
    print("measured", file.name, np.abs(ours - theirs)[given].max(), len(set(tokens)), np.exp(ours.max(1)).mean())
    assert np.abs(ours - theirs)[given].max() < close
    best = np.sort(ours, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * close
    assert clear.any()
    np.testing.assert_array_equal(np.argmax(ours, axis=1)[clear], np.array(tokens)[clear])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_log_probabilities_are_ours(tokenizer, name: str, tmp_path: Path):
    config = model_of(tokenizer, MODELS[name])
    weights = weights_of(config)
    close = CLOSE["f32"] if config.activation == "silu" else GELU
    agree(config, weights, write(tmp_path / "model.gguf", config, weights, tokenizer), close)


@pytest.mark.parametrize(("model_type", "case"), CLASSES, ids=lambda x: str(x)[:60])
def test_a_model_of_transformers_computes_the_same_in_llama_cpp(tokenizer, model_type: str, case, tmp_path: Path):
    config, weights = imported(model_type, case, tokenizer, tmp_path)
    close = CLOSE["f32"] if config.activation == "silu" else GELU
    # The name of the file is the name of the model.
    agree(config, weights, write(tmp_path / f"{model_type}.gguf", config, weights, tokenizer), close)


def imported(model_type: str, case: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> tuple[ModelConfig, Any]:
    sizes = SIZES | ({} if model_type == "gpt_neox" else KV) | {"vocab_size": tokenizer.vocab_size}
    theirs = foreign(model_type, sizes | case, folder / "theirs")
    interchange = Interchange.from_config(theirs.hf_config)
    read = interchange.import_reader(theirs.tensors.__getitem__)
    return interchange.config, nested_weights(interchange.config, read)


def test_every_architecture_has_a_case():
    others = {"llama", "mistral", "gemma", "qwen3", "gpt2"}
    assert ARCHITECTURES.keys() == {model_type for model_type, _ in CLASSES} | others


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_dtypes_stay_near(tokenizer, name: str, dtype: str, tmp_path: Path):
    config = model_of(tokenizer, MODELS[name])
    weights = weights_of(config)
    file = write(tmp_path / f"{dtype}.gguf", config, weights, tokenizer, dtype)
    agree(config, weights, file, CLOSE[dtype])
    whole = write(tmp_path / "f32.gguf", config, weights, tokenizer)
    matrices = file.stat().st_size / whole.stat().st_size
    assert matrices < {"f16": 0.6, "bf16": 0.6, "q8_0": 0.4}[dtype]


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    """Serves a model with our tokenizer."""
    config = model_of(tokenizer, {"num_layers": 1})
    file = write(tmp_path_factory.mktemp("served") / "model.gguf", config, weights_of(config), tokenizer)
    return LlamaCpp(file, context=8192)


def test_llama_cpp_finds_our_tokens(tokenizer, served: LlamaCpp):
    texts = [text.replace("\u2581", "") for text in NASTY]
    texts += ["\ue000", "\ue0001", "a \ue000\ue000b", "<|endoftext|> <0x41>", "def f():\n\n    return  1\n"]
    for text in texts:
        ids = served.tokenize(text)
        assert ids == tokenizer.encode(text).tolist()
        assert served.detokenize(ids) == text
    # llama.cpp puts the BOS token before a prompt.
    assert served.tokenize("a b", special=True) == tokenizer.encode_with_bos("a b")


def test_llama_cpp_finds_our_tokens_of_code_but_for_rare_runs_of_whitespace(tokenizer, served: LlamaCpp):
    same = total = 0
    for text in (text[:4000] for text in code()[40:80]):
        theirs, ours = served.tokenize(text), tokenizer.encode(text).tolist()
        blocks = difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks()
        same, total = same + sum(block.size for block in blocks), total + len(ours)
        assert served.detokenize(theirs) == text
        assert [i for i in theirs if tokenizer.token_bytes(i).strip()] == [
            i for i in ours if tokenizer.token_bytes(i).strip()
        ]
    print("measured", total - same, "of", total)
    assert same / total > 0.995


def test_llama_cpp_reads_a_real_u2581_as_a_space(tokenizer, served: LlamaCpp):
    assert served.tokenize("a\u2581b") == tokenizer.encode("a b").tolist()
    assert served.detokenize(tokenizer.encode("a\u2581b").tolist()) == "a b"


KINDS = ("gpt2", "llama3", "qwen", "llama2", "gemma")


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_finds_the_tokens_of_other_peoples_tokenizers(tokenizer, kind: str, tmp_path: Path):
    fallback = kind in ("llama2", "gemma")
    settings = others.byte_fallback(kind, tokenizer) if fallback else others.byte_level(kind)
    folder = others.write(tmp_path / kind, settings, "</s>" if fallback else others.EOS)
    foreign = load_tokenizer(folder)
    # The model may have more ids than the tokenizer.
    config = model_of(foreign, {"num_layers": 1, "vocab_size": foreign.vocab_size + 3})
    served = LlamaCpp(write(tmp_path / "model.gguf", config, weights_of(config), foreign), context=8192)
    # llama.cpp normalizes nothing; Qwen's tokenizer composes characters.
    for text in [*NASTY, *(text[:4000] for text in code()[40:80:5])]:
        text = unicodedata.normalize("NFC", text.replace("\u2581", ""))
        assert served.tokenize(text) == foreign.encode(text).tolist()
    assert served.tokenize("a", special=True) == foreign.encode_with_bos("a")


def test_llama_cpp_knows_the_marks_of_a_middle(tmp_path: Path):
    ours = train_tokenizer(code()[:10], 800, tmp_path / "ours", FIM_TOKENS)
    ids = dict(zip(("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"), ours.fim_ids(), strict=True))
    assert gguf_metadata(ours, 800).items() >= ids.items()
    config = model_of(ours, {"num_layers": 1})
    served = LlamaCpp(write(tmp_path / "model.gguf", config, weights_of(config), ours), context=8192)
    P, S, M = FIM_TOKENS
    for text in (f"a{P}b", f"{P}{S}{M}", code()[20][:500]):
        assert served.tokenize(text) == ours.encode(text).tolist()
    # Its own endpoint for infills puts the pieces between the marks; it refuses a model without them.
    before, after = "def f(a):\n", "\n    return b\n"
    assert served.infill(before, after) == f"<|endoftext|>{P}{before}{S}{after}{M}"


LONGROPE_FIELDS = {"rope_scaling": "longrope", "rope_factor": 2.0, "rope_original_context": 8}
LONGROPE_FIELDS |= {"rope_short_divisors": "1,1,1,1", "rope_long_divisors": "1,2,3,4", "head_dim": 8}


def test_choices_that_llama_cpp_computes_differently_are_refused_by_name(tokenizer, tmp_path: Path):
    for changes, words in [
        ({"activation": "gelu_tanh"}, "llama.cpp's llama has no model.activation = gelu_tanh"),
        ({"sliding_window": CONTEXT - 1}, "no model.sliding_window = 31"),
        ({"qk_norm": True, "attention_bias": True}, "qwen3 has no model.attention_bias = True"),
        (YARN | {"rope_high_turns": 16.0, "rope_low_turns": 2.0}, "no model.rope_high_turns = 16.0, no model.rope_low"),
        ({"qk_norm": True} | LLAMA3_FIELDS, "qwen3 has no model.rope_scaling = llama3"),
        (GEMMA | {"tie_embeddings": False}, "gemma has no model.tie_embeddings = False"),
        (GPT | {"activation": "relu"}, "gpt2 has no model.activation = relu"),
        (GPT | {"norm_placement": "post", "feedforward_dim": 256}, "no model.norm_placement = post"),
        ({"attention_softcap": 5.0}, "no model.attention_softcap = 5.0"),
        (YARN | {"rope_length": 2.0}, "llama has no model.rope_length = 2.0"),
        (LONGROPE_FIELDS, "llama has no model.rope_scaling = longrope"),
        (GEMMA2_FIELDS | {"attention_scale": 0.1}, "gemma2 has no model.attention_scale = 0.1"),
        (GEMMA2_FIELDS | {"attention_softcap": None}, "gemma2 has no model.attention_softcap = None"),
        (GEMMA2_FIELDS | {"logit_softcap": None}, "gemma2 has no model.logit_softcap = None"),
        (GEMMA2_FIELDS | {"sliding_window": None, "layer_pattern": None}, "gemma2 has no model.sliding_window = None"),
        (GEMMA3_FIELDS | LINEAR_FIELDS, "gemma3 has no model.window_rope_scaling = True"),
        (OLMO3_FIELDS | LINEAR_FIELDS, "olmo2 has no model.window_rope_scaling = True"),
        (OLMO3_FIELDS | {"window_rope_base": 100.0}, "olmo2 has no model.window_rope_base = 100.0"),
        ({"layer_pattern": "NFFF", "num_layers": 4}, "smollm3 has no model.layer_pattern = NFFF"),
        ({"layer_pattern": "SF", "sliding_window": 5}, "llama has no model.sliding_window = 5"),
        (QWEN2_FIELDS | {"head_dim": 32}, "qwen2 has no model.head_dim = 32"),
        (QWEN2_FIELDS | {"sliding_window": 5}, "qwen2 has no model.sliding_window = 5"),
        (NEOX_FIELDS | {"activation": "gelu"}, "gptneox has no model.activation = gelu"),
        (COHERE2_FIELDS | {"attention_bias": True}, "cohere2 has no model.attention_bias = True"),
        (COHERE2_FIELDS | {"tie_embeddings": False}, "cohere2 has no model.tie_embeddings = False"),
        (LATENT_FIELDS | {"num_layers": 26}, "deepseek2 has no model.query_latent_dim = 20"),
        (LATENT_FIELDS | {"num_layers": 27}, "deepseek2 has no model.query_latent_dim = 20"),
        (LATENT_FIELDS | {"num_layers": 48, "vocab_size": 128_256}, "deepseek2 has no model.query_latent_dim = 20"),
        (LATENT_FIELDS | YARN | {"rope_factor": 1.0}, "deepseek2 has no model.rope_factor = 1.0"),
        (LATENT_FIELDS | YARN | {"rope_low_turns": 2.0}, "deepseek2 has no model.rope_low_turns = 2.0"),
        (LATENT_FIELDS | {"router_groups": 2}, "deepseek2 has no model.router_groups = 2"),
        (LATENT_FIELDS | {"activation": "relu"}, "deepseek2 has no model.activation = relu"),
        ({"vocab_size": tokenizer.vocab_size - 1}, f"has {tokenizer.vocab_size} ids, the model"),
    ]:
        config = model_of(tokenizer, changes)
        with pytest.raises(InputError, match=words):
            write_gguf(tmp_path / "model.gguf", WeightSource(config, CONTEXT, tokenizer, never))
    assert not list(tmp_path.iterdir())


def never(name: str, layer: int | None) -> np.ndarray:
    raise AssertionError("no weights are read")


def test_tokenizers_that_llama_cpp_has_no_name_for_are_refused(tokenizer, tmp_path: Path):
    split, merged = others.byte_level("llama3"), others.byte_fallback("gemma", tokenizer)
    pattern = {"type": "Split", "pattern": {"Regex": "[0-9]|[^0-9]+"}, "behavior": "Isolated", "invert": False}
    after = split["pre_tokenizer"]["pretokenizers"][1]
    sequence = {"type": "Sequence", "pretokenizers": [pattern, after]}
    merges = merged["model"]["merges"]
    for settings, eos, words in [
        (split | {"pre_tokenizer": sequence}, others.EOS, "splits a text in a way"),
        (split | {"normalizer": {"type": "Lowercase"}}, others.EOS, "splits a text in a way"),
        (merged | {"model": merged["model"] | {"merges": merges[:-1]}}, "</s>", "joins pieces in an order"),
        (merged | {"normalizer": {"type": "Lowercase"}}, "</s>", "changes a text in a way"),
    ]:
        foreign = load_tokenizer(others.write(tmp_path / "tokenizer", settings, eos))
        with pytest.raises(InputError, match=f"cannot go into a GGUF file: it {words}"):
            write_gguf(tmp_path / "model.gguf", WeightSource(model_of(foreign, {}), CONTEXT, foreign, never))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_several_tokens_before_a_text_are_refused(tokenizer):
    """llama.cpp would put only the first there."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.bos_ids = [0, 1]
    with pytest.raises(InputError, match="it puts several tokens before a text; export --format=hf"):
        gguf_metadata(tokenizer, tokenizer.vocab_size)


def test_a_file_appears_whole_and_replaces_only_its_like(tokenizer, tmp_path: Path, monkeypatch):
    config = model_of(tokenizer, {})
    weights = weights_of(config)
    file = write(tmp_path / "new" / "model.gguf", config, weights, tokenizer)
    content = file.read_bytes()
    read, calls = reader_of(weights), iter(range(9))

    def stops(name: str, layer: int | None) -> np.ndarray:
        if next(calls) == 8:
            raise OSError("no space")  # as NumPy's, without a number
        return read(name, layer)

    with pytest.raises(StorageError, match=r"model\.gguf cannot be written: no space"):
        write_gguf(file, WeightSource(config, CONTEXT, tokenizer, stops), "f16")
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    assert file.read_bytes() == content
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10**5))
    with pytest.raises(StorageError, match=r"has 0\.1 MB free, and 0\.\d MB are"):
        write(file, config, weights, tokenizer)
    monkeypatch.undo()
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]
    assert write(file, config, weights, tokenizer, "f16").stat().st_size < len(content)
    (tmp_path / "notes").write_text("notes")
    for there, words in [
        (tmp_path / "notes", "something else than a GGUF file"),
        (tmp_path, "is a folder"),
        (tmp_path / "notes" / "model.gguf", "notes is a file; name another file"),
    ]:
        with pytest.raises(InputError, match=words):
            write(there, config, weights, tokenizer)
    assert (tmp_path / "notes").read_text() == "notes"


def test_it_holds_one_tensor_at_a_time(tokenizer, tmp_path: Path):
    config = model_of(tokenizer, {"num_layers": 3})
    read, asked = reader_of(weights_of(config)), []

    def counted(name: str, layer: int | None) -> np.ndarray:
        asked.append((name, layer, unfinished(tmp_path / "model.gguf")[0].stat().st_size))
        return read(name, layer)

    write_gguf(tmp_path / "model.gguf", WeightSource(config, CONTEXT, tokenizer, counted))
    layers = [layer for _, layer, _ in asked if layer is not None]
    assert layers == sorted(layers)
    assert len({size for _, layer, size in asked if layer == 2}) > 3
    assert asked[-1][2] > 0.7 * (tmp_path / "model.gguf").stat().st_size


def test_rows_that_do_not_divide_by_32_are_f16_in_q8_0(tokenizer, tmp_path: Path, caplog):
    config = model_of(tokenizer, {"feedforward_dim": 48})
    weights = weights_of(config)
    file = write(tmp_path / "q8_0.gguf", config, weights, tokenizer, "q8_0")
    assert "2 matrices have rows that do not divide by 32; they are f16" in caplog.text
    agree(config, weights, file, CLOSE["q8_0"])


def test_values_too_large_for_f16_are_refused(tokenizer, tmp_path: Path):
    config = model_of(tokenizer, {})
    weights = jax.tree.map(lambda x: 1e6 * x, weights_of(config))
    with pytest.raises(InputError, match=r"token_embd\.weight has values too large for f16; take bf16"):
        write(tmp_path / "model.gguf", config, weights, tokenizer, "f16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [(np.nan, "f32", "has NaN or infinite values"), (np.inf, "q8_0", "has NaN or infinite values"),
     (3.4e38, "bf16", "has values too large for bf16")],
)  # fmt: skip
def test_values_that_the_file_cannot_hold_are_refused_by_name(tokenizer, tmp_path: Path, value, dtype, problem):
    config = model_of(tokenizer, {})
    weights = weights_of(config)
    table = np.array(weights["embedding"]["table"])
    table[3, 2] = value
    weights["embedding"]["table"] = table
    with pytest.raises(InputError, match=rf"token_embd\.weight {problem}"):
        write(tmp_path / "model.gguf", config, weights, tokenizer, dtype)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[gguf\]'"):
        write_gguf(tmp_path / "model.gguf", WeightSource(model_of(tokenizer, {}), CONTEXT, tokenizer, never))
