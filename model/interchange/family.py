"""The description of a Transformers class: its config keys, its tensors, and its choices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.config_keys import ConfigKey
from model.interchange.tensors import Tensor


@dataclass(frozen=True)
class Family:
    """One class of Transformers.

    Attributes:
        architecture: name of the class in Transformers.
        prefix: first word of all tensor names except the unembedding's.
        tensors: all tensors that its files may have, in their order.
        context: config key for the number of positions that it sees at once.
        choices: values that a field can have, by field; a field that is missing here can have any.
        limits: predicates of a config that the class requires, by field.
        always: fields that the class always has; a model without them is widened.
        required: values of config keys that an import must have.
        extra_keys: function from our config to further config keys.
        extra_fields: function from config keys to further fields of ours.
        ignored: ends of names of tensors in older files that no model needs.
    """

    model_type: str
    architecture: str
    prefix: str
    keys: tuple[ConfigKey, ...]
    tensors: tuple[Tensor, ...]
    context: ConfigKey
    choices: Mapping[str, tuple[Any, ...]]
    limits: Mapping[str, Callable[[ResolvedModelConfig], bool]] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    extra_keys: Callable[[ResolvedModelConfig], dict[str, Any]] = lambda config: {}
    extra_fields: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf_config: {}
    ignored: tuple[str, ...] = ()

    def lacks(self, config: ResolvedModelConfig) -> list[str]:
        """Returns the choices of a model that the class does not have, as "model.field = value"."""
        named = {key.field: tuple(key.values) for key in self.keys if key.values}
        choices = {**self.choices, **named}
        wrong = [name for name, values in choices.items() if getattr(config, name) not in values]
        wrong += [name for name, holds in self.limits.items() if not holds(config)]
        return [f"model.{name} = {getattr(config, name)}" for name in dict.fromkeys(wrong)]

    def widened(self, config: ResolvedModelConfig, context: int) -> ResolvedModelConfig:
        """Returns the model of the same function that has everything that the class always has."""
        changes = dict(self.always)
        if changes.get("position", config.position) != config.position:
            changes["max_positions"] = context
        if config.scale_embeddings and self.choices.get("scale_embeddings") != (True,):
            # The factor is folded into the table, which can then not be the unembedding.
            changes |= {"scale_embeddings": False, "tie_embeddings": False}
        return replace(config, **changes)
