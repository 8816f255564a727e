"""Settings of the decoder: its size, and the choice made on each of its floors. Shape legend of the whole project:

B batch, T time (positions), S source time (keys), D model width, H query heads, K key/value heads, C head width,
F feed-forward width, V vocabulary (padded), L layers.
"""

from dataclasses import dataclass, field, fields, replace

VOCABULARY_MULTIPLE = 128
# Fields that name one of several ways, and their values.
CHOICES = {
    "position": ("rope", "sinusoidal", "learned", "none"),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post"),
    "compute_dtype": ("bfloat16", "float32"),
    "attention_kernel": ("auto", "plain", "splash", "cudnn"),
    "remat_policy": ("none", "products", "attention", "full", "offload_products", "offload"),
}
# 256 MB in float32, forward; the backward pass has a few such arrays.
LOGITS_AT_ONCE = 2**26
# Turns over the original context from which a rotary pair keeps its frequency: the published values.
HIGH_TURNS = {"llama3": 4.0, "yarn": 32.0}
# Fields that have no effect with a choice of `rope_scaling`.
TURNS = ("rope_original_context", "rope_low_turns", "rope_high_turns")
UNUSED_BY_SCALING = {"none": ("rope_factor", *TURNS), "linear": TURNS, "llama3": (), "yarn": ()}


@dataclass(frozen=True)
class ModelConfig:
    """The shape and numerics of the decoder. Fields at none are derived by `resolved`."""

    # ── Size ───────────────────────────────────────────────────────────────────────────────────────────────────────
    num_layers: int = field(default=4, metadata={"help": "decoder blocks (L)"})
    model_dim: int = field(default=256, metadata={"help": "width of the residual stream (D)"})
    num_heads: int = field(default=4, metadata={"help": "query heads (H)"})
    num_kv_heads: int | None = field(
        default=None,
        metadata={"help": "key/value heads (K), shared by H/K query heads each: H is MHA, 1 is MQA; none: num_heads"},
    )
    head_dim: int | None = field(default=None, metadata={"help": "width of a head (C); none: model_dim / num_heads"})
    feedforward_dim: int | None = field(
        default=None,
        metadata={
            "help": "inner width of the feed-forward (F); none: 4 model_dim, or 8/3 up to a multiple of 64 where gated"
        },
    )
    vocab_size: int | None = field(default=None, metadata={"help": "tokens; none: what the tokenizer has"})

    # ── Floor 1: token embedding ───────────────────────────────────────────────────────────────────────────────────
    tie_embeddings: bool = field(default=False, metadata={"help": "the unembedding is the embedding, transposed"})
    scale_embeddings: bool = field(
        default=False, metadata={"help": "multiply embeddings by √model_dim (Vaswani et al. 2017, section 3.4)"}
    )
    embedding_dropout: float = field(
        default=0.0, metadata={"help": "part of the embeddings, positions added, that is dropped", "resume": "warn"}
    )

    # ── Floor 2: position ──────────────────────────────────────────────────────────────────────────────────────────
    position: str = field(default="rope", metadata={"help": "rope, sinusoidal, learned or none"})
    max_positions: int | None = field(
        default=None, metadata={"help": "rows of the table of learned positions; none: data.segment_length"}
    )
    rope_base: float = field(default=10_000.0, metadata={"help": "base of the rotary frequencies"})
    rope_scaling: str = field(
        default="none", metadata={"help": "rotary frequencies for a longer context: none, linear, llama3 or yarn"}
    )
    rope_factor: float = field(
        default=1.0, metadata={"help": "how many times longer the context is than rope_original_context"}
    )
    rope_original_context: int | None = field(
        default=None, metadata={"help": "positions that the unscaled frequencies were trained for (llama3, yarn)"}
    )
    rope_low_turns: float = field(
        default=1.0,
        metadata={"help": "pairs with fewer turns over the original context are slowed by the whole factor"},
    )
    rope_high_turns: float | None = field(
        default=None, metadata={"help": "pairs with more turns are left alone; none: 4 for llama3, 32 for yarn"}
    )

    # ── Floor 3: attention ─────────────────────────────────────────────────────────────────────────────────────────
    attention_bias: bool = field(default=False, metadata={"help": "biases of queries, keys, values and output"})
    qk_norm: bool = field(
        default=False, metadata={"help": "RMSNorm of each head's queries and keys (Dehghani et al. 2023)"}
    )
    sliding_window: int | None = field(
        default=None,
        metadata={"help": "newest positions that each sees, itself included (Beltagy et al. 2020); none: all"},
    )
    attention_softcap: float | None = field(
        default=None,
        metadata={"help": "scores become c·tanh(score/c) (Gemma 2, Riviere et al. 2024); none: as they are"},
    )
    attention_dropout: float = field(
        default=0.0, metadata={"help": "part of the attention weights that is dropped", "resume": "warn"}
    )

    attention_kernel: str = field(
        default="auto",
        metadata={
            "help": "auto: by the platform, splash on TPU, cudnn on GPU, else plain; or one of them",
            "resume": "warn",
        },
    )

    # ── Floor 4: feed-forward ──────────────────────────────────────────────────────────────────────────────────────
    activation: str = field(default="silu", metadata={"help": "silu, gelu (exact), gelu_tanh (GPT-2's) or relu"})
    gated: bool = field(
        default=True,
        metadata={"help": "the activation gates a second product (Shazeer 2020): with silu SwiGLU, with gelu GeGLU"},
    )
    feedforward_bias: bool = field(default=False, metadata={"help": "biases of the feed-forward's products"})

    # ── The stack ──────────────────────────────────────────────────────────────────────────────────────────────────
    norm: str = field(
        default="rmsnorm",
        metadata={"help": "rmsnorm (Zhang and Sennrich 2019) or layernorm, with its bias (Ba et al. 2016)"},
    )
    norm_placement: str = field(
        default="pre",
        metadata={
            "help": "pre: before attention and feed-forward, and a last one; post: after each sum (Vaswani et al. 2017)"
        },
    )
    norm_epsilon: float = field(default=1e-5, metadata={"help": "added to the mean square under a norm's root"})
    residual_dropout: float = field(
        default=0.0,
        metadata={"help": "part of what attention and feed-forward add that is dropped", "resume": "warn"},
    )

    # ── Floor 5: linear + softmax, and the loss ────────────────────────────────────────────────────────────────────
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "part of the target spread over all tokens (Szegedy et al. 2016)", "resume": "warn"},
    )
    z_loss: float = field(
        default=0.0,
        metadata={
            "help": "weight of log² of the softmax's denominator in what is minimized (PaLM, 2022)",
            "resume": "warn",
        },
    )
    loss_chunk: int | None = field(
        default=None,
        metadata={
            "help": "positions on a device whose logits exist at once in the loss; none: 2²⁶ logits' worth",
            "resume": "free",
        },
    )

    # ── Numerics ───────────────────────────────────────────────────────────────────────────────────────────────────
    compute_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "bfloat16 or float32, for activations and products; weights, softmax and loss stay float32",
            "resume": "warn",
        },
    )
    remat_policy: str = field(
        default="none",
        metadata={
            "help": "what the forward pass keeps: none (no remat: all), products (what matrix products and attention "
            "give), attention, full (remat: each layer's input alone), offload_products and offload (products, or the "
            "inputs alone, in the host's memory)",
            "resume": "free",
        },
    )

    def resolved(self, vocab_size: int | None = None, context: int | None = None) -> "ModelConfig":
        """The same model with every derived field filled in; `vocab_size` is the tokenizer's, `context` the data's."""
        vocab_size = self.vocab_size or vocab_size
        inner = -(-8 * self.model_dim // (3 * 64)) * 64 if self.gated else 4 * self.model_dim
        return replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.model_dim // self.num_heads,
            feedforward_dim=self.feedforward_dim or inner,
            vocab_size=vocab_size,
            max_positions=self.max_positions or (context if self.position == "learned" else None),
            rope_high_turns=self.rope_high_turns or HIGH_TURNS.get(self.rope_scaling),
            loss_chunk=self.loss_chunk or (max(LOGITS_AT_ONCE // vocab_size, 1) if vocab_size else None),
        )

    @property
    def dropout(self) -> bool:
        """Whether training drops anything."""
        return max(self.embedding_dropout, self.attention_dropout, self.residual_dropout) > 0

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        sizes = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "feedforward_dim", "vocab_size")
        for name in (*sizes, "max_positions", "rope_original_context", "sliding_window", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"model.{name} is {value}; it must be at least 1")
        for name in ("norm_epsilon", "rope_low_turns", "rope_high_turns", "attention_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"model.{name} is {value}; it must be above 0")
        if self.rope_base <= 1:
            found.append(f"model.rope_base is {self.rope_base}; it must be above 1")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.z_loss < 0:
            found.append(f"model.z_loss is {self.z_loss}; it must be at least 0")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                found.append(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        return found or [*self._size_problems(), *self._position_problems()]

    def _size_problems(self) -> list[str]:
        found = []
        if self.head_dim is None and self.model_dim % self.num_heads:
            found.append(
                f"model.model_dim = {self.model_dim} does not divide by model.num_heads = {self.num_heads}; "
                "change one, or give model.head_dim"
            )
        elif self.position == "rope" and (self.head_dim or self.model_dim // self.num_heads) % 2:
            found.append("model.head_dim is odd; rotary positions turn pairs of components, so it must be even")
        if self.position == "sinusoidal" and self.model_dim % 2:
            found.append(f"model.model_dim = {self.model_dim} is odd; sinusoidal positions are pairs, sine and cosine")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            found.append(f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}")
        return found

    def _position_problems(self) -> list[str]:
        found = []
        if self.max_positions and self.position != "learned":
            found.append(f"model.max_positions is for learned positions; leave it at none with {self.position}")
        unused = dict.fromkeys(UNUSED_BY_SCALING[self.rope_scaling], f"model.rope_scaling = {self.rope_scaling}")
        if self.position != "rope":
            unused |= dict.fromkeys(("rope_base", "rope_scaling"), f"model.position = {self.position}")
        for setting in fields(self):
            if setting.name in unused and getattr(self, setting.name) != setting.default:
                default = "none" if setting.default is None else setting.default
                found.append(f"model.{setting.name} has no effect with {unused[setting.name]}; leave it at {default}")
        if self.rope_factor < 1:
            found.append(f"model.rope_factor is {self.rope_factor}; it must be at least 1")
        if self.rope_scaling in HIGH_TURNS:
            if self.rope_original_context is None:
                found.append(f"model.rope_scaling = {self.rope_scaling} needs model.rope_original_context")
            if (self.rope_high_turns or HIGH_TURNS[self.rope_scaling]) <= self.rope_low_turns:
                found.append("model.rope_high_turns must be above model.rope_low_turns")
        return found
