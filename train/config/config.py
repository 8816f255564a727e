"""All settings of a run: one dataclass for each group, written and resolved.

The dataclasses are the only source of fields, defaults, units and documentation (see `settings`).
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig, ResolvedDataConfig, TokenizerConfig
from data.printable import without_credentials
from model.config import ModelConfig, ResolvedModelConfig
from train.config.checkpoint_config import CheckpointConfig
from train.config.objective_config import ObjectiveConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.recovery_config import RecoveryConfig
from train.config.run_config import EvaluationConfig, MeshConfig, TrainConfig

# As a shell command it does nothing.
NOT_KEPT = "# not kept"


@dataclass(frozen=True)
class Config:
    """All settings of a run as a user writes them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def resolved(self, vocab_size: int | None = None) -> "ResolvedConfig":
        """Returns the same settings with every derived field filled in; `vocab_size` is the tokenizer's."""
        groups: dict[str, Any] = vars(self) | {
            "model": self.model.resolved(vocab_size, self.data.segment_length),
            "data": ResolvedDataConfig(**vars(self.data) | {"num_streams": self.num_streams}),
            "checkpoint": self.checkpoint.resolved(),
        }
        return ResolvedConfig(**groups)

    @property
    def num_streams(self) -> int:
        """The number of virtual readers of the corpus (V)."""
        rows = self.train.batch_ramp_start or self.train.batch_size
        return self.data.num_streams or max(rows // self.objective.rows_of_prompt, 1)


class ResolvedConfig(Config):
    """Resolved settings of a run. The annotations narrow types of `Config`, for type checkers alone."""

    model: ResolvedModelConfig
    data: ResolvedDataConfig


def config_fields() -> Iterator[tuple[str, str, dataclasses.Field]]:
    """Yields (group, name, field) for every setting, in order."""
    for group in dataclasses.fields(Config):
        for setting in dataclasses.fields(typing.cast(type, group.type)):
            yield group.name, setting.name, setting


def public(config: Config) -> Config:
    """Returns the settings as they are kept in a run's folder and published.

    URLs of corpora have no credentials, and a hook is NOT_KEPT: its command often holds a secret, and a run's folder is
    never asked for it.
    """

    def corpus_of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: corpus_of(inner) for name, inner in value.items()}
        return without_credentials(value) if isinstance(value, str) else value

    data = dataclasses.replace(config.data, corpus=corpus_of(config.data.corpus))
    hook = NOT_KEPT if config.train.on_event else None
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, on_event=hook))


def to_json(config: Config) -> str:
    """Returns the text of config.json: the `public` values by group and field, as `make_config` takes them."""
    return json.dumps(dataclasses.asdict(public(config)), indent=2) + "\n"
