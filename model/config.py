"""Settings of the decoder: its size, and the choice made on each of its floors. Shape legend of the whole project:

B batch, T time (positions), S source time (keys), D model width, H query heads, K key/value heads, C head width,
F feed-forward width, E experts, V vocabulary (padded), L layers.
"""

from dataclasses import dataclass
from typing import Any

from model.fields import ModelFields
from settings import problems_of, unused_problems

VOCABULARY_MULTIPLE = 128
# 1 GiB in float32. Each chunk reads and writes the sum of the unembedding's gradient: with fewer logits that takes
# longer than the chunk's products.
LOGITS_AT_ONCE = 2**28
# Turns over the original context above which a rotary pair keeps its frequency: the published values.
HIGH_TURNS = {"llama3": 4.0, "yarn": 32.0}
# Kinds of layers in `layer_pattern`.
LAYER_LETTERS = {"F": "full attention", "S": "the sliding window", "N": "full attention without positions"}
# The pattern of models that have none: without and with a sliding window.
DEFAULT_PATTERN = ("F", "S")
# Fields that are for experts alone.
EXPERT_FIELDS = (
    *("experts_per_token", "expert_dim", "dense_layers", "shared_expert_dim", "shared_expert_gate"),
    *("router_score", "router_normalize", "router_scale", "router_bias", "router_groups", "router_groups_per_token"),
    *("balance_bias", "balance_rate", "balance_loss", "balance_over", "router_z_loss"),
)
# Fields of the unembedding and its loss, which a model with a reward head does not have.
UNEMBEDDING_FIELDS = ("tie_embeddings", "logit_multiplier", "logit_softcap", "loss_chunk")
# Fields without effect, by the choice of `rope_scaling`.
_TURNS = ("rope_low_turns", "rope_high_turns")
_DIVISORS = ("rope_short_divisors", "rope_long_divisors", "rope_long")
UNUSED_BY_SCALING = {
    "none": ("rope_factor", "rope_length", "rope_original_context", "rope_truncate", *_TURNS, *_DIVISORS),
    "linear": ("rope_length", "rope_original_context", "rope_truncate", *_TURNS, *_DIVISORS),
    "llama3": ("rope_length", "rope_truncate", *_DIVISORS),
    "yarn": _DIVISORS,
    "longrope": ("rope_truncate", *_TURNS),
}


@dataclass(frozen=True)
class ModelConfig(ModelFields):
    """The shape and numerics of the decoder."""

    def resolved(self, vocab_size: int | None = None, context: int | None = None) -> "ResolvedModelConfig":
        """Returns the same model with every derived field filled in.

        Args:
            vocab_size: number of the tokenizer's ids, needed unless the config has one.
            context: positions of a segment, for learned positions.
        """
        vocab_size = self.vocab_size or vocab_size
        head_dim, output_bias = self.head_dim or self.model_dim // self.num_heads, self.attention_output_bias
        gated_dim = -(-8 * self.model_dim // (3 * 64)) * 64
        feedforward_dim = self.feedforward_dim or (gated_dim if self.gated else 4 * self.model_dim)
        values: dict[str, Any] = vars(self) | {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": head_dim,
            "rope_dim": (self.rope_dim or head_dim) if self.position == "rope" else None,
            "value_dim": self.value_dim or head_dim,
            "attention_output_bias": self.attention_bias if output_bias is None else output_bias,
            "feedforward_dim": feedforward_dim,
            "expert_dim": (self.expert_dim or feedforward_dim) if self.num_experts else None,
            "vocab_size": vocab_size,
            "max_positions": self.max_positions or (context if self.position == "learned" else None),
            "rope_high_turns": self.rope_high_turns or HIGH_TURNS.get(self.rope_scaling),
            "loss_chunk": self.loss_chunk or self._usual_chunk(vocab_size),
        }
        return ResolvedModelConfig(**values)

    def _usual_chunk(self, vocab_size: int | None) -> int | None:
        return max(LOGITS_AT_ONCE // vocab_size, 1) if vocab_size and not self.reward_head else None

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
        if self.reward_head:
            unused |= dict.fromkeys(UNEMBEDDING_FIELDS, "model.reward_head = True")
        problems += unused_problems("model", self, unused)
        if self.activation == "clamped_swiglu" and not self.gated:
            problems.append("model.activation = clamped_swiglu is gated; set model.gated")
        if self.block != "sequential" and self.norm_placement != "pre":
            problems.append(f"model.block = {self.block} is for model.norm_placement = pre, not {self.norm_placement}")
        problems += self._parametrization_problems()
        problems += self._pattern_problems()
        problems += self._latent_problems()
        problems += self._expert_problems()
        if self.rope_scaling in HIGH_TURNS:
            if self.rope_original_context is None:
                problems.append(f"model.rope_scaling = {self.rope_scaling} needs model.rope_original_context")
            between = (self.rope_high_turns or HIGH_TURNS[self.rope_scaling]) - self.rope_low_turns
            # Of Kimi K2 the two are the same: yarn's whole pairs then keep them apart.
            if between < 0 or (between == 0 and self.rope_scaling == "llama3"):
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

    def _parametrization_problems(self) -> list[str]:
        given = f"model.parametrization = {self.parametrization}"
        if self.parametrization == "standard":
            return unused_problems("model", self, dict.fromkeys(("base_dim", "base_layers"), given))
        problems = []
        if self.tie_embeddings:
            problems.append(f"{given} trains embedding and unembedding at different rates; leave out tie_embeddings")
        if self.norm_placement == "post":
            problems.append(
                f"{given} scales the branches, and a norm after each sum undoes that; give another model.norm_placement"
            )
        fixed = {"kv_latent_dim": None, "shared_expert_gate": False, "smear": False, "attention_gate": False}
        fixed |= {"value_embedding_every": None, "residual_scalars": False}
        chosen = [name for name, without in fixed.items() if getattr(self, name) != without]
        problems += [f"{given} has no rule for model.{name}; leave it out" for name in chosen]
        if self.base_dim is None:
            return [*problems, f"{given} needs model.base_dim, the model_dim for which the learning rate was chosen"]
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}
        for name, number in heads.items():
            # A single key/value head is one at every width.
            if number and number * self.base_dim % self.model_dim and (name, number) != ("num_kv_heads", 1):
                problems.append(
                    f"model.{name} = {number} would be {number * self.base_dim / self.model_dim:.3g} at "
                    f"model.base_dim = {self.base_dim}, of model.model_dim = {self.model_dim}; change one, since the "
                    "width of a head stays"
                )
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
        problems += [f"{given}: there is no model.{name} with latents" for name in chosen]
        if self.value_embedding_every:
            problems.append(f"{given}: values are made of latents; leave model.value_embedding_every at none")
        return problems

    def _expert_problems(self) -> list[str]:
        E, k, groups, chosen = (
            self.num_experts, self.experts_per_token, self.router_groups, self.router_groups_per_token,
        )  # fmt: skip
        if E is None:
            return unused_problems("model", self, dict.fromkeys(EXPERT_FIELDS, "no model.num_experts"))
        given = f"model.num_experts = {E}"
        problems = []
        if self.matmul_dtype:
            problems.append(f"{given}: experts are multiplied in model.compute_dtype; leave model.matmul_dtype at none")
        if k > E:
            problems.append(f"{given} is below model.experts_per_token = {k}")
        if not self.gated:
            problems.append(f"{given}: experts are gated; set model.gated")
        if E % groups:
            problems.append(f"{given} does not divide by model.router_groups = {groups}")
        elif chosen > groups or k > chosen * (E // groups) or (groups > 1 and E // groups < 2):
            problems.append(
                f"model.router_groups_per_token = {chosen} of model.router_groups = {groups} have too few experts for "
                f"model.experts_per_token = {k}"
            )
        unused = {}
        if self.router_score == "softmax_of_chosen":
            unused = dict.fromkeys(("router_normalize", "balance_bias"), "model.router_score = softmax_of_chosen")
        if self.shared_expert_dim is None:
            unused["shared_expert_gate"] = "no model.shared_expert_dim"
        if not self.balance_bias:
            unused["balance_rate"] = "no model.balance_bias"
        if not self.balance_loss:
            unused["balance_over"] = "model.balance_loss = 0"
        return problems + unused_problems("model", self, unused)

    def _pattern_problems(self) -> list[str]:
        pattern = self.layer_pattern or DEFAULT_PATTERN[self.sliding_window is not None]
        given = f"model.layer_pattern = {pattern}"
        problems = []
        if unknown := sorted(set(pattern) - set(LAYER_LETTERS) - set(map(str.lower, LAYER_LETTERS))):
            letters = ", ".join(f"{letter} ({meaning})" for letter, meaning in LAYER_LETTERS.items())
            problems.append(f"{given}: {', '.join(unknown)} is no kind of layer; there are {letters}")
        elif pattern.upper() != pattern and self.num_experts is None:
            problems.append(f"{given}: small letters are dense layers among experts; give model.num_experts")
        elif not any(pattern[i % len(pattern)].isupper() for i in range(self.dense_layers, self.num_layers)):
            problems.append(f"{given} and model.dense_layers = {self.dense_layers} leave no layer with experts")
        pattern = pattern.upper()
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
    expert_dim: int
    vocab_size: int
    loss_chunk: int
