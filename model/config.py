"""Settings of the decoder. Shape legend of the whole project:

B batch, T time (positions), S source time (keys), D model width, H query heads, K key/value heads, C head width,
F feed-forward width, V vocabulary (padded), L layers.
"""

from dataclasses import dataclass, field, replace

VOCABULARY_MULTIPLE = 128
COMPUTE_DTYPES = ("bfloat16", "float32")
REMAT_POLICIES = ("none", "products", "full")


@dataclass(frozen=True)
class ModelConfig:
    """The shape and numerics of the decoder. Fields at none are derived by `resolved`."""

    num_layers: int = field(default=4, metadata={"help": "decoder blocks (L)"})
    model_dim: int = field(default=256, metadata={"help": "width of the residual stream (D)"})
    num_heads: int = field(default=4, metadata={"help": "query heads (H)"})
    num_kv_heads: int | None = field(
        default=None, metadata={"help": "key/value heads (K), shared by H/K query heads each; none: num_heads"}
    )
    head_dim: int | None = field(default=None, metadata={"help": "width of a head (C); none: model_dim / num_heads"})
    feedforward_dim: int | None = field(
        default=None,
        metadata={"help": "inner width of the feed-forward (F); none: 8/3 model_dim, up to a multiple of 64"},
    )
    vocab_size: int | None = field(default=None, metadata={"help": "tokens; none: what the tokenizer has"})
    tie_embeddings: bool = field(default=False, metadata={"help": "the unembedding is the embedding, transposed"})
    rope_base: float = field(default=10_000.0, metadata={"help": "base of the rotary frequencies"})
    norm_epsilon: float = field(default=1e-5, metadata={"help": "added to the mean square in RMSNorm"})
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
            "help": "what the backward pass recomputes: none, products (all but matrix products) or full",
            "resume": "free",
        },
    )
    loss_chunk: int = field(
        default=256,
        metadata={"help": "positions of a row whose logits exist at once in the loss", "resume": "free"},
    )

    def resolved(self, vocab_size: int | None = None) -> "ModelConfig":
        """The same model with every derived field filled in; `vocab_size` is the tokenizer's."""
        return replace(
            self,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.model_dim // self.num_heads,
            feedforward_dim=self.feedforward_dim or -(-8 * self.model_dim // (3 * 64)) * 64,
            vocab_size=self.vocab_size or vocab_size,
        )

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        for name in ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "feedforward_dim",
                     "vocab_size", "loss_chunk"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"model.{name} is {value}; it must be at least 1")
        if found:
            return found
        if self.head_dim is None and self.model_dim % self.num_heads:
            found.append(
                f"model.model_dim = {self.model_dim} does not divide by model.num_heads = {self.num_heads}; "
                "change one, or give model.head_dim"
            )
        elif (self.head_dim or self.model_dim // self.num_heads) % 2:
            found.append("model.head_dim is odd; rotary positions turn pairs of components, so it must be even")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            found.append(f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}")
        for name, allowed in (("compute_dtype", COMPUTE_DTYPES), ("remat_policy", REMAT_POLICIES)):
            if getattr(self, name) not in allowed:
                found.append(f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("rope_base", "norm_epsilon"):
            if getattr(self, name) <= 0:
                found.append(f"model.{name} is {getattr(self, name)}; it must be above 0")
        return found
