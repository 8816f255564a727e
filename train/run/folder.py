"""A run's folder: config.json, tokenizer/, checkpoints/, what it logs, and the documents that it holds out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from etils import epath

from data.files.atomic import atomic_file
from train.config.config import Config, to_json
from train.run.run_name import CONFIG_FILE, read_config
from train.run.storage import checkpoint_steps_in


class HeldOutDocument(NamedTuple):
    """A held-out document: its text, what stands before it and is not counted, and the name of its corpus."""

    text: str
    prompt: str = ""
    corpus: str = ""


@dataclass(frozen=True)
class Run:
    """The paths of a run's folder.

    Attributes:
        folder: of the run.
        checkpoint_dir: `checkpoint.dir`, where its checkpoints are elsewhere.
    """

    folder: Path
    checkpoint_dir: str | None = None

    @classmethod
    def from_config(cls, config: Config) -> "Run":
        """The run of these settings."""
        return cls(Path(config.train.run_dir).expanduser(), config.checkpoint.resolved().dir)

    @classmethod
    def load(cls, folder: Path) -> tuple["Run", Config]:
        """A run that has begun, and its settings. InputError as `load_config`."""
        config = cls(folder).load_config()
        return cls(folder, config.checkpoint.dir), config

    @property
    def config_file(self) -> Path:
        """The resolved settings."""
        return self.folder / CONFIG_FILE

    @property
    def tokenizer(self) -> Path:
        """The run's own tokenizer, or its copy."""
        return self.folder / "tokenizer"

    @property
    def checkpoints(self) -> epath.Path:
        """Orbax's folder, which may be in a bucket."""
        return epath.Path(self.checkpoint_dir or self.folder / "checkpoints")

    @property
    def snapshot(self) -> Path:
        """The default corpus as it was when the run began."""
        return self.folder / "corpus" / "stdlib.jsonl"

    @property
    def held_out(self) -> Path:
        """The documents that the run evaluates on, so that its folder is enough to evaluate it."""
        return self.folder / "held_out.jsonl"

    @property
    def metrics(self) -> Path:
        """What was measured, a line a step."""
        return self.folder / "metrics.jsonl"

    @property
    def positions(self) -> Path:
        """Where the data was after some of the steps."""
        return self.folder / "positions.jsonl"

    @property
    def lease(self) -> Path:
        """Who writes to the folder."""
        return self.folder / "lease.json"

    @property
    def events(self) -> Path:
        """What happened to the run beside its steps."""
        return self.folder / "events.jsonl"

    @property
    def recovery(self) -> Path:
        """What the run has tried again and left out."""
        return self.folder / "recovery.jsonl"

    @property
    def profile(self) -> Path:
        """Traces of steps."""
        return self.folder / "profile"

    @property
    def export(self) -> Path:
        """Weights for inference, written at the end."""
        return self.folder / "export"

    def last_step(self) -> int | None:
        """Of the newest complete checkpoint; none where there is none. That of imported weights is of step 0."""
        return max(checkpoint_steps_in(self.checkpoints), default=None)

    def save_config(self, config: Config) -> None:
        """Write config.json at once."""
        with atomic_file(self.config_file) as partial:
            partial.write_text(to_json(config))

    def load_config(self) -> Config:
        """The run's settings. InputError where the folder is no run or its config is damaged."""
        return read_config(self.folder)

    def held_out_texts(self) -> list[HeldOutDocument]:
        """The documents of `held_out`."""
        if not self.held_out.is_file():
            return []
        return [HeldOutDocument(**json.loads(line)) for line in self.held_out.read_text().splitlines()]

    def save_held_out(self, texts: list[HeldOutDocument]) -> None:
        """Keep these documents with the run."""
        records = ({name: value for name, value in text._asdict().items() if value} for text in texts)
        with atomic_file(self.held_out) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
