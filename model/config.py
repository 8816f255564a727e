"""Settings of the decoder: its size, and the choice made on each of its floors. Shape legend of the whole project:

B batch, T time (positions), S source time (keys), D model width, H query heads, K key/value heads, C head width,
F feed-forward width, V vocabulary (padded), L layers.
"""

from dataclasses import dataclass
from typing import Any

from settings import problems_of, setting, unused_problems

VOCABULARY_MULTIPLE = 128
# 256 MB in float32 for the forward pass; the backward pass has a few such arrays.
LOGITS_AT_ONCE = 2**26
# Turns over the original context above which a rotary pair keeps its frequency: the published values.
HIGH_TURNS = {"llama3": 4.0, "yarn": 32.0}
# Classes of Transformers by model_type, in the order in which they are tried.
EXPORT_CLASSES = (
    *("gemma", "llama", "mistral", "qwen3", "gpt2", "openai-gpt", "qwen2", "ministral", "smollm3", "phi3", "granite"),
    *("glm4", "olmo2", "olmo3", "gemma2", "gemma3_text", "gpt_neox", "stablelm", "starcoder2", "cohere2"),
    *("deepseek_v3", "deepseek_v2"),
)
# Kinds of layers in `layer_pattern`.
LAYER_LETTERS = {"F": "full attention", "S": "the sliding window", "N": "full attention without positions"}
# The pattern of models that have none: without and with a sliding window.
DEFAULT_PATTERN = ("F", "S")
# Fields without effect, by the choice of `rope_scaling`.
_TURNS = ("rope_low_turns", "rope_high_turns")
_DIVISORS = ("rope_short_divisors", "rope_long_divisors", "rope_long")
UNUSED_BY_SCALING = {
    "none": ("rope_factor", "rope_length", "rope_original_context", *_TURNS, *_DIVISORS),
    "linear": ("rope_length", "rope_original_context", *_TURNS, *_DIVISORS),
    "llama3": ("rope_length", *_DIVISORS),
    "yarn": _DIVISORS,
    "longrope": _TURNS,
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape and numerics of the decoder."""

    # ── Size ───────────────────────────────────────────────────────────────────────────────────────────────────────
    num_layers: int = setting(4, "decoder blocks (L)", at_least=1, at_most=10_000)
    model_dim: int = setting(256, "width of the residual stream (D)", at_least=1, at_most=2**20)
    num_heads: int = setting(4, "query heads (H)", at_least=1, at_most=2**16)
    num_kv_heads: int | None = setting(
        None,
        "key/value heads (K), each shared by H/K query heads: H is MHA, 1 is MQA",
        unset="num_heads",
        at_least=1,
        at_most=2**16,
    )
    head_dim: int | None = setting(
        None, "width of a head (C)", unset="model_dim / num_heads", at_least=1, at_most=2**16
    )
    feedforward_dim: int | None = setting(
        None,
        "inner width of the feed-forward (F)",
        unset="4 model_dim, or 8/3 of it up to a multiple of 64 if gated",
        at_least=1,
        at_most=2**24,
    )
    vocab_size: int | None = setting(
        None, "number of token ids", unset="those of the tokenizer", at_least=1, at_most=2**24
    )

    # ── Floor 1: token embedding ───────────────────────────────────────────────────────────────────────────────────
    tie_embeddings: bool = setting(False, "use the transposed embedding as the unembedding")
    scale_embeddings: bool = setting(False, "multiply embeddings by √model_dim (Vaswani et al. 2017, section 3.4)")
    embedding_multiplier: float = setting(1.0, "factor of the embeddings (Granite; muP, Yang et al. 2022)", above=0)
    embedding_dropout: float = setting(
        0.0, "share of the embeddings that is dropped, after positions are added", resume="warn", at_least=0, below=1
    )

    # ── Floor 2: position ──────────────────────────────────────────────────────────────────────────────────────────
    position: str = setting("rope", "how attention learns positions", choices=("rope", "sinusoidal", "learned", "none"))
    max_positions: int | None = setting(
        None, "rows of the table of learned positions", unset="data.segment_length", at_least=1, at_most=2**24
    )
    rope_base: float = setting(10_000.0, "base of the rotary frequencies", above=1)
    rope_dim: int | None = setting(
        None, "first components of a head that are rotated (GPT-NeoX)", unset="head_dim", at_least=2, at_most=2**16
    )
    rope_scaling: str = setting(
        "none",
        "scaling of rotary frequencies for a longer context",
        choices=("none", "linear", "llama3", "yarn", "longrope"),
    )
    rope_factor: float = setting(1.0, "factor by which the context exceeds rope_original_context", at_least=1)
    rope_original_context: int | None = setting(
        None,
        "positions that the unscaled frequencies were trained for (llama3, yarn, longrope)",
        unset="not set",
        at_least=1,
    )
    rope_low_turns: float = setting(
        1.0, "rotary pairs with fewer turns over the original context are slowed by the whole factor", above=0
    )
    rope_high_turns: float | None = setting(
        None, "rotary pairs with more turns keep their frequency", unset="4 for llama3, 32 for yarn", above=0
    )

    rope_length: float | None = setting(
        None,
        "length of rotated vectors of length 1 with yarn or longrope",
        unset="0.1 ln(rope_factor) + 1 for yarn, √(1 + ln(rope_factor)/ln(rope_original_context)) for longrope",
        above=0,
    )
    rope_short_divisors: str | None = setting(
        None, "longrope's divisors of the frequencies of all pairs, with commas between them", unset="not set"
    )
    rope_long_divisors: str | None = setting(
        None, "those in rows that are longer than rope_original_context", unset="not set"
    )
    rope_long: bool | None = setting(None, "use rope_long_divisors", unset="by the length of a row", resume="warn")
    window_rope_base: float | None = setting(
        None, "base of the rotary frequencies in layers with the sliding window", unset="rope_base", above=1
    )
    window_rope_scaling: bool = setting(True, "rope_scaling holds for layers with the sliding window, too")

    # ── Floor 3: attention ─────────────────────────────────────────────────────────────────────────────────────────
    kv_latent_dim: int | None = setting(
        None,
        "width of the latent that keys and values are made of (multi-head latent attention, DeepSeek-V2 2024)",
        unset="no latent",
        at_least=1,
        at_most=2**20,
    )
    query_latent_dim: int | None = setting(
        None, "width of a latent that queries are made of", unset="no latent", at_least=1, at_most=2**20
    )
    value_dim: int | None = setting(
        None, "width of a head's values in latent attention", unset="head_dim", at_least=1, at_most=2**16
    )
    attention_bias: bool = setting(False, "biases of queries, keys and values")
    attention_output_bias: bool | None = setting(None, "bias of attention's output", unset="attention_bias")
    qk_norm: bool = setting(False, "RMSNorm of queries and keys (Dehghani et al. 2023)")
    qk_norm_over: str = setting(
        "head",
        "what qk_norm takes the mean square over: each head, or all heads (OLMo 2)",
        choices=("head", "all_heads"),
    )
    attention_scale: float | None = setting(None, "factor of the product q·k", unset="1/√head_dim", above=0)
    sliding_window: int | None = setting(
        None,
        "newest positions that each position attends to, itself included (Beltagy et al. 2020)",
        unset="all",
        at_least=1,
    )
    attention_softcap: float | None = setting(
        None, "c in scores c·tanh(score/c) (Gemma 2, Riviere et al. 2024)", unset="no cap", above=0
    )
    attention_sinks: bool = setting(
        False, "a learned score in each head's softmax, without a value (gpt-oss; Xiao et al. 2023)"
    )
    attention_dropout: float = setting(
        0.0, "share of the attention weights that is dropped", resume="warn", at_least=0, below=1
    )
    attention_kernel: str = setting(
        "auto",
        "attention kernel; auto is splash on TPU, cudnn on GPU where it applies, and otherwise plain",
        resume="warn",
        choices=("auto", "plain", "splash", "cudnn"),
    )

    # ── Floor 4: feed-forward ──────────────────────────────────────────────────────────────────────────────────────
    activation: str = setting(
        "silu",
        "activation; gelu is exact, gelu_tanh is GPT-2's, relu2 is relu's square (So et al. 2021); clamped_swiglu is "
        "gpt-oss's, and gated",
        choices=("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"),
    )
    gated: bool = setting(
        True, "gate a second product with the activation (Shazeer 2020): SwiGLU with silu, GeGLU with gelu"
    )
    feedforward_bias: bool = setting(False, "biases of the feed-forward's products")

    # ── The stack ──────────────────────────────────────────────────────────────────────────────────────────────────
    layer_pattern: str | None = setting(
        None,
        "kinds of layers from the first on, repeated (SSSF: every fourth layer is full): F full attention, S the "
        "sliding window, N full attention without positions",
        unset="F, or S with a sliding window",
    )
    norm: str = setting(
        "rmsnorm",
        "normalization: rmsnorm (Zhang and Sennrich 2019) or layernorm (Ba et al. 2016)",
        choices=("rmsnorm", "layernorm"),
    )
    norm_bias: bool = setting(True, "layernorm's bias")
    norm_offset: bool = setting(False, "a norm multiplies by 1 + its weight, which starts at 0 (Gemma)")
    norm_placement: str = setting(
        "pre",
        "pre: before attention and feed-forward; output: of their outputs, before the sum (OLMo 2); both (Gemma 2); "
        "post: after each sum, and no last norm (Vaswani et al. 2017)",
        choices=("pre", "post", "output", "both"),
    )
    block: str = setting(
        "sequential",
        "sequential: feed-forward reads the sum with attention; parallel: both read the block's input "
        "(GPT-NeoX), parallel_one_norm: through one norm (GPT-J, PaLM)",
        choices=("sequential", "parallel", "parallel_one_norm"),
    )
    residual_multiplier: float = setting(1.0, "factor of the outputs of attention and feed-forward (Granite)", above=0)
    norm_epsilon: float = setting(1e-5, "added to the mean square under the root of a norm", above=0)
    residual_dropout: float = setting(
        0.0, "share of the outputs of attention and feed-forward that is dropped", resume="warn", at_least=0, below=1
    )

    # ── Floor 5: linear + softmax, and the loss ────────────────────────────────────────────────────────────────────
    logit_multiplier: float = setting(1.0, "factor of the logits (Cohere, Granite; muP)", above=0)
    logit_softcap: float | None = setting(
        None, "c in logits c·tanh(logit/c) (Gemma 2, Riviere et al. 2024)", unset="no cap", above=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target spread over all tokens (Szegedy et al. 2016)", resume="warn", at_least=0, below=1
    )
    z_loss: float = setting(
        0.0, "weight of log² of the softmax's denominator in the minimized loss (PaLM, 2022)", resume="warn", at_least=0
    )
    loss_chunk: int | None = setting(
        None,
        "positions on a device whose logits exist at once in the loss",
        unset="2²⁶ logits",
        resume="free",
        at_least=1,
    )

    # ── Export ─────────────────────────────────────────────────────────────────────────────────────────────────────
    export_as: str | None = setting(
        None,
        "model_type of the class in Transformers that exports take",
        unset="the first that has all choices",
        resume="free",
        choices=EXPORT_CLASSES,
    )

    # ── Numerics ───────────────────────────────────────────────────────────────────────────────────────────────────
    compute_dtype: str = setting(
        "bfloat16",
        "dtype of activations and products; weights, softmax and loss are float32",
        resume="warn",
        choices=("bfloat16", "float32"),
    )
    remat_policy: str = setting(
        "none",
        "what the forward pass keeps for the backward pass: none (no remat) keeps all, products the outputs of matrix "
        "products and attention, attention its output, full each layer's input alone; offload_products and offload "
        "keep products, or the inputs, in the host's memory",
        resume="free",
        choices=("none", "products", "attention", "full", "offload_products", "offload"),
    )

    def resolved(self, vocab_size: int | None = None, context: int | None = None) -> "ResolvedModelConfig":
        """Returns the same model with every derived field filled in.

        Args:
            vocab_size: number of the tokenizer's ids, needed unless the config has one.
            context: positions of a segment, for learned positions.
        """
        vocab_size = self.vocab_size or vocab_size
        head_dim, output_bias = self.head_dim or self.model_dim // self.num_heads, self.attention_output_bias
        gated_dim = -(-8 * self.model_dim // (3 * 64)) * 64
        values: dict[str, Any] = vars(self) | {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": head_dim,
            "rope_dim": (self.rope_dim or head_dim) if self.position == "rope" else None,
            "value_dim": self.value_dim or head_dim,
            "attention_output_bias": self.attention_bias if output_bias is None else output_bias,
            "feedforward_dim": self.feedforward_dim or (gated_dim if self.gated else 4 * self.model_dim),
            "vocab_size": vocab_size,
            "max_positions": self.max_positions or (context if self.position == "learned" else None),
            "rope_high_turns": self.rope_high_turns or HIGH_TURNS.get(self.rope_scaling),
            "loss_chunk": self.loss_chunk or (max(LOGITS_AT_ONCE // vocab_size, 1) if vocab_size else None),
        }
        return ResolvedModelConfig(**values)

    @property
    def dropout(self) -> bool:
        """True if training drops anything."""
        return max(self.embedding_dropout, self.attention_dropout, self.residual_dropout) > 0

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        if problems := problems_of("model", self):
            return problems
        if self.head_dim is None and self.model_dim % self.num_heads:
            problems.append(
                f"model.model_dim = {self.model_dim} does not divide by model.num_heads = {self.num_heads}; "
                "change one, or give model.head_dim"
            )
        elif self.position == "rope":
            problems += self._rope_problems(self.head_dim or self.model_dim // self.num_heads)
        if self.position == "sinusoidal" and self.model_dim % 2:
            problems.append(
                f"model.model_dim = {self.model_dim} is odd; sinusoidal positions are pairs, sine and cosine"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            problems.append(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}"
            )
        if self.max_positions and self.position != "learned":
            problems.append(f"model.max_positions is for learned positions; leave it at none with {self.position}")
        unused = dict.fromkeys(UNUSED_BY_SCALING[self.rope_scaling], f"model.rope_scaling = {self.rope_scaling}")
        if self.position != "rope":
            names = ("rope_base", "rope_dim", "rope_scaling", "window_rope_base", "window_rope_scaling")
            unused |= dict.fromkeys(names, f"model.position = {self.position}")
        if self.norm == "rmsnorm":
            unused["norm_bias"] = "model.norm = rmsnorm"
        if not self.qk_norm:
            unused["qk_norm_over"] = "model.qk_norm = False"
        problems += unused_problems("model", self, unused)
        if self.activation == "clamped_swiglu" and not self.gated:
            problems.append("model.activation = clamped_swiglu is gated; set model.gated")
        if self.block != "sequential" and self.norm_placement != "pre":
            problems.append(f"model.block = {self.block} is for model.norm_placement = pre, not {self.norm_placement}")
        problems += self._pattern_problems()
        problems += self._latent_problems()
        if self.rope_scaling in HIGH_TURNS:
            if self.rope_original_context is None:
                problems.append(f"model.rope_scaling = {self.rope_scaling} needs model.rope_original_context")
            if (self.rope_high_turns or HIGH_TURNS[self.rope_scaling]) <= self.rope_low_turns:
                problems.append("model.rope_high_turns must be above model.rope_low_turns")
        return problems

    def _rope_problems(self, head_dim: int) -> list[str]:
        name, rotated = ("head_dim", head_dim) if self.rope_dim is None else ("rope_dim", self.rope_dim)
        if rotated % 2:
            return [f"model.{name} is odd; rotary positions turn pairs of components, so it must be even"]
        if rotated > head_dim:
            return [f"model.rope_dim = {rotated} is above model.head_dim = {head_dim}"]
        if self.rope_scaling != "longrope":
            return []
        if self.rope_original_context is None or self.rope_original_context < 2:
            return ["model.rope_scaling = longrope needs model.rope_original_context of at least 2"]
        problems = []
        for name in ("rope_short_divisors", "rope_long_divisors"):
            numbers = divisors(getattr(self, name) or "")
            if len(numbers) != rotated // 2 or not all(number > 0 for number in numbers):
                problems.append(f"model.{name} must be {rotated // 2} numbers above 0 with commas between them")
        return problems

    def _latent_problems(self) -> list[str]:
        if self.kv_latent_dim is None:
            wide = self.head_dim or self.model_dim // self.num_heads
            names = ["query_latent_dim"] + (["value_dim"] if self.value_dim != wide else [])
            return unused_problems("model", self, dict.fromkeys(names, "no model.kv_latent_dim"))
        given = f"model.kv_latent_dim = {self.kv_latent_dim}"
        problems = []
        if self.position != "rope" or not 0 < (self.rope_dim or 0) < (self.head_dim or 0):
            problems.append(f"{given} rotates a part of each head; give model.head_dim and a smaller model.rope_dim")
        if (self.num_kv_heads or self.num_heads) != self.num_heads:
            problems.append(f"{given} has keys for every head; leave out model.num_kv_heads")
        chosen = [name for name in ("attention_bias", "attention_output_bias", "qk_norm") if getattr(self, name)]
        return problems + [f"{given}: there is no model.{name} with latents" for name in chosen]

    def _pattern_problems(self) -> list[str]:
        pattern = self.layer_pattern or DEFAULT_PATTERN[self.sliding_window is not None]
        given = f"model.layer_pattern = {pattern}"
        problems = []
        if unknown := sorted(set(pattern) - set(LAYER_LETTERS)):
            letters = ", ".join(f"{letter} ({meaning})" for letter, meaning in LAYER_LETTERS.items())
            problems.append(f"{given}: {', '.join(unknown)} is no kind of layer; there are {letters}")
        if len(pattern) > self.num_layers:
            problems.append(f"{given} is longer than model.num_layers = {self.num_layers}; shorten it")
        if "S" in pattern and self.sliding_window is None:
            problems.append(f"{given} has layers with a window; give model.sliding_window")
        if "N" in pattern and self.position != "rope":
            problems.append(f"{given}: N is for rotary positions, and model.position is {self.position}")
        if "S" not in pattern:
            without = f"{given}, without S" if self.layer_pattern else "no model.sliding_window"
            unused = ("sliding_window", "window_rope_base", "window_rope_scaling")
            problems += unused_problems("model", self, dict.fromkeys(unused, without))
        return problems


def divisors(text: str) -> list[float]:
    """Returns the numbers of `rope_short_divisors` or `rope_long_divisors`; none where they cannot be read."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return []


class ResolvedModelConfig(ModelConfig):
    """Resolved settings, from which the model is built.

    The annotations narrow types of `ModelConfig`, for type checkers alone. `vocab_size` and `loss_chunk` follow from a
    tokenizer; a config that was resolved without one must not use them.
    """

    num_kv_heads: int
    head_dim: int
    rope_dim: int
    value_dim: int
    attention_output_bias: bool
    feedforward_dim: int
    vocab_size: int
    loss_chunk: int
