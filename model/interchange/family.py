"""What a class of Hugging Face Transformers is to us: its settings, its tensors, and the choices that it has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import ResolvedModelConfig
from model.interchange.settings import Setting
from model.interchange.tensors import Tensor


@dataclass(frozen=True)
class Family:
    """One class of theirs.

    Attributes:
        kind: its `model_type`.
        first: the word that its tensors' names begin with, but for the unembedding's.
        architecture: the class's name.
        settings: of its config.json.
        tensors: all that its files may have, in their order.
        context: the setting that says how many positions it sees at once.
        choices: our field → the values that it can have; a field that is not here can have any.
        limits: our field → whether its value is one that the class can have.
        always: what it has in any case. A model that does without is written with zeros, or with its positions as a
            table, and says so in config.json.
        fixed: settings that are refused where they are others.
        more_to: further settings of theirs from our config.
        more_from: further fields of ours from their settings.
        without: ends of the names of tensors that older files have and no model needs.
    """

    kind: str
    architecture: str
    first: str
    settings: tuple[Setting, ...]
    tensors: tuple[Tensor, ...]
    context: Setting
    choices: Mapping[str, tuple[Any, ...]]
    limits: Mapping[str, Callable[[ResolvedModelConfig], bool]] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more_to: Callable[[ResolvedModelConfig], dict[str, Any]] = lambda config: {}
    more_from: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda theirs: {}
    without: tuple[str, ...] = ()

    def lacks(self, config: ResolvedModelConfig) -> list[str]:
        """The choices of a model that it does not have, as "model.field = value"."""
        named = {setting.ours: tuple(setting.names) for setting in self.settings if setting.names}
        choices = {**self.choices, **named}
        wrong = [name for name, values in choices.items() if getattr(config, name) not in values]
        wrong += [name for name, holds in self.limits.items() if not holds(config)]
        return [f"model.{name} = {getattr(config, name)}" for name in dict.fromkeys(wrong)]

    def widened(self, config: ResolvedModelConfig, context: int) -> ResolvedModelConfig:
        """The model of the same function that has all that the class has in any case."""
        changes = dict(self.always)
        if changes.get("position", config.position) != config.position:
            changes["max_positions"] = context
        if config.scale_embeddings and self.choices["scale_embeddings"] != (True,):
            # The factor goes into the table, which then is not the unembedding, too.
            changes |= {"scale_embeddings": False, "tie_embeddings": False}
        return replace(config, **changes)
