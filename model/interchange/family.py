"""The description of a Transformers class: its config keys, its tensors, and its choices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import EXPERT_FIELDS, UNEMBEDDING_FIELDS, ResolvedModelConfig
from model.interchange.config_keys import ConfigKey
from model.interchange.layer_types import of_one_kind
from model.interchange.tensors import Tensor

Choices = dict[str, tuple[Any, ...] | None]
Limits = dict[str, Callable[[ResolvedModelConfig], bool] | None]
# Values of fields that a class has unless it says otherwise.
USUAL: Choices = {
    "embedding_multiplier": (1.0,),
    "smear": (False,),
    "window_rope_base": (None,),
    "window_rope_scaling": (True,),
    "qk_norm_over": ("head",),
    "attention_scale": (None,),
    "attention_softcap": (None,),
    "attention_sinks": (False,),
    "attention_gate": (False,),
    "value_embedding_every": (None,),
    "kv_latent_dim": (None,),
    "norm_bias": (True,),
    "norm_offset": (False,),
    "block": ("sequential",),
    "residual_multiplier": (1.0,),
    "residual_scalars": (False,),
    "logit_multiplier": (1.0,),
    "logit_softcap": (None,),
    "num_experts": (None,),
}
USUAL_LIMITS: Mapping[str, Callable[[ResolvedModelConfig], bool]] = {
    "layer_pattern": of_one_kind,
    "rope_dim": lambda config: config.rope_dim in (None, config.head_dim),
    "value_dim": lambda config: config.value_dim == config.head_dim,
    "attention_output_bias": lambda config: config.attention_output_bias == config.attention_bias,
}
# Values of `model_type` whose classes with a linear head have been compared with this decoder.
CLASSIFIERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
# In `choices` and `limits`: any value.
ANY = None


@dataclass(frozen=True)
class Family:
    """One class of Transformers.

    Attributes:
        architecture: name of the class in Transformers.
        prefix: first word of all tensor names except the unembedding's.
        tensors: all tensors that its files may have, in their order.
        context: config key for the number of positions that it sees at once.
        choices: values that a field can have, by field, or ANY; a field that neither this nor `USUAL` has can have any.
        limits: predicates of a config that the class requires, by field, besides `USUAL_LIMITS`; or ANY.
        always: fields that the class always has; a model without them is widened.
        required: values of config keys that an import must have.
        extra_keys: function from our config to further config keys.
        extra_fields: function from config keys to further fields of ours.
        ignored: ends of names of tensors in older files that no model needs.
        without_effect: config keys that have no effect on logits in this class, besides `WITHOUT_EFFECT`.
        other_types: further values of `model_type` in files of the class.
        one_width: `feedforward_dim` is `expert_dim`, because no layer is dense.
        quantization: the `quant_method` of quantized weights that are read.
        predicted_key: config key for the number of layers behind the last one, which predict further tokens and are
            left out.
    """

    model_type: str
    architecture: str
    prefix: str
    keys: tuple[ConfigKey, ...]
    tensors: tuple[Tensor, ...]
    context: ConfigKey
    choices: Choices
    limits: Limits = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    extra_keys: Callable[[ResolvedModelConfig], dict[str, Any]] = lambda config: {}
    extra_fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf_config: {}
    ignored: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    other_types: tuple[str, ...] = ()
    one_width: bool = False
    quantization: str | None = None
    predicted_key: str | None = None

    @property
    def classifier(self) -> str | None:
        """The class of the same model with a linear head, to which reward models are exported; None without one."""
        name = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return name if self.model_type in CLASSIFIERS else None

    def lacks(self, config: ResolvedModelConfig) -> list[str]:
        """Returns the choices of a model that the class does not have, as "model.field = value"."""
        keys = {key.field: tuple(key.values) if key.values else ANY for key in self.keys}
        choices = {**USUAL, **keys, **self.choices} | {name: values for name, values in keys.items() if values}
        wrong = [name for name, values in choices.items() if values and getattr(config, name) not in values]
        if config.reward_head:
            # No class needs a certain last floor where there is none.
            wrong = [name for name in wrong if name not in UNEMBEDDING_FIELDS]
            wrong += [] if self.classifier else ["reward_head"]
        limits = {**USUAL_LIMITS, **self.limits}
        wrong += [name for name, holds in limits.items() if holds and not holds(config)]
        return [f"model.{name} = {getattr(config, name)}" for name in dict.fromkeys(wrong)]

    def widened(self, config: ResolvedModelConfig, context: int) -> ResolvedModelConfig:
        """Returns the model of the same function that has everything that the class always has."""
        unused = () if config.num_experts else EXPERT_FIELDS
        changes = {name: value for name, value in self.always.items() if name not in unused}
        if self.one_width:
            changes["feedforward_dim"] = config.expert_dim
        if changes.get("position", config.position) != config.position:
            changes["max_positions"] = context
        if config.scale_embeddings and self.choices.get("scale_embeddings") != (True,):
            # The factor is folded into the table, which can then not be the unembedding.
            changes |= {"scale_embeddings": False, "tie_embeddings": False}
        return replace(config, **changes)
