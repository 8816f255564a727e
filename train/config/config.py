"""The settings of a run: one dataclass a group, and how values from a preset, a file and flags become them.

The dataclasses are the only source of fields, defaults, units and documentation. Each field's metadata holds `help`
and `resume`: whether a change of it on resume is refused ("frozen", where nothing is said), accepted with a warning
("warn") or in silence ("free"). Everything wrong with a config is reported at once.
"""

import dataclasses
import json
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig, TokenizerConfig
from model.config import ModelConfig
from train.config.checkpoint_config import CheckpointConfig
from train.config.optimizer_config import OptimizerConfig
from train.config.recovery_config import RecoveryConfig
from train.config.run_config import EvaluationConfig, MeshConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def resolved(self, vocab_size: int | None = None) -> "Config":
        """The same settings with every derived field filled in; `vocab_size` is the tokenizer's."""
        return dataclasses.replace(
            self,
            model=self.model.resolved(vocab_size, self.data.segment_length),
            data=dataclasses.replace(self.data, num_streams=self.num_streams),
            checkpoint=self.checkpoint.resolved(),
        )

    @property
    def num_streams(self) -> int:
        """V: the virtual readers of the corpus."""
        return self.data.num_streams or self.train.batch_ramp_start or self.train.batch_size


def config_fields() -> Iterator[tuple[str, str, dataclasses.Field]]:
    """(group, field's name, field) of every setting, in order."""
    for group in dataclasses.fields(Config):
        for setting in dataclasses.fields(typing.cast(type, group.type)):
            yield group.name, setting.name, setting


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain values by group and field, which `make_config` takes: what a run saves as config.json."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(config), indent=2) + "\n"
