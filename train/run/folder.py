"""A run's folder: config.json, tokenizer/, checkpoints/, its logs, and its held-out documents."""

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
    """A held-out document: its text, a prompt before it that is not scored, and the name of its corpus."""

    text: str
    prompt: str = ""
    corpus: str = ""


@dataclass(frozen=True)
class Run:
    """The paths of a run's folder.

    Attributes:
        folder: the run's own folder.
        checkpoint_dir: `checkpoint.dir`, if its checkpoints are in another place.
    """

    folder: Path
    checkpoint_dir: str | None = None

    @classmethod
    def from_config(cls, config: Config) -> "Run":
        """Returns the run that a config describes."""
        return cls(Path(config.train.run_dir).expanduser(), config.checkpoint.resolved().dir)

    @classmethod
    def load(cls, folder: Path) -> tuple["Run", Config]:
        """Returns an existing run and its config. Raises InputError as `load_config` does."""
        config = cls(folder).load_config()
        return cls(folder, config.checkpoint.dir), config

    @property
    def config_file(self) -> Path:
        """The file of the resolved config."""
        return self.folder / CONFIG_FILE

    @property
    def tokenizer(self) -> Path:
        """The folder of the run's own tokenizer, or of its copy."""
        return self.folder / "tokenizer"

    @property
    def checkpoints(self) -> epath.Path:
        """Orbax's folder, which may be in a bucket."""
        return epath.Path(self.checkpoint_dir or self.folder / "checkpoints")

    @property
    def snapshot(self) -> Path:
        """A copy of the default corpus, made when the run began."""
        return self.folder / "corpus" / "stdlib.jsonl"

    @property
    def held_out(self) -> Path:
        """The held-out documents, so that the folder is enough to evaluate the run."""
        return self.folder / "held_out.jsonl"

    @property
    def metrics(self) -> Path:
        """The metrics, one line a step."""
        return self.folder / "metrics.jsonl"

    @property
    def positions(self) -> Path:
        """The positions in the data after some of the steps."""
        return self.folder / "positions.jsonl"

    @property
    def lease(self) -> Path:
        """The lease of the processes that write to the folder."""
        return self.folder / "lease.json"

    @property
    def events(self) -> Path:
        """The audit log, which records everything apart from steps."""
        return self.folder / "events.jsonl"

    @property
    def recovery(self) -> Path:
        """The ledger of retried and skipped batches."""
        return self.folder / "recovery.jsonl"

    @property
    def profile(self) -> Path:
        """The folder of profiler traces."""
        return self.folder / "profile"

    @property
    def export(self) -> Path:
        """The weights for inference, written at the end."""
        return self.folder / "export"

    def last_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None. Imported weights have step 0."""
        return max(checkpoint_steps_in(self.checkpoints), default=None)

    def save_config(self, config: Config) -> None:
        """Writes config.json atomically."""
        with atomic_file(self.config_file) as partial:
            partial.write_text(to_json(config))

    def load_config(self) -> Config:
        """Returns the run's config. Raises InputError if the folder is not a run or its config is damaged."""
        return read_config(self.folder)

    def held_out_texts(self) -> list[HeldOutDocument]:
        """Reads the held-out documents; none if there is no file."""
        if not self.held_out.is_file():
            return []
        return [HeldOutDocument(**json.loads(line)) for line in self.held_out.read_text().splitlines()]

    def save_held_out(self, texts: list[HeldOutDocument]) -> None:
        """Writes the held-out documents atomically."""
        records = ({name: value for name, value in text._asdict().items() if value} for text in texts)
        with atomic_file(self.held_out) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
