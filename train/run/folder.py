"""A run's folder: config.json, tokenizer/, checkpoints/, its logs, and its held-out documents."""

import json
from pathlib import Path
from typing import NamedTuple

from etils import epath

from data.files.atomic import atomic_file
from data.files.json_file import parse_json
from data.formats import Answers, Sequence
from train.config.config import Config, to_json
from train.run.json_lines import Record, read_whole
from train.run.run_name import CONFIG_FILE, read_config
from train.run.storage import checkpoint_steps_in, with_input_errors


class HeldOutDocument(NamedTuple):
    """A held-out document: its text, a prompt before it that is not scored, and the name of its corpus.

    The text of a document that is `cut` is followed by no EOS. Of a conversation, the characters of its `answers` are
    scored. A pair also has the answer that was `rejected`.
    """

    text: str
    prompt: str = ""
    corpus: str = ""
    cut: bool = False
    answers: Answers | None = None
    rejected: Sequence | None = None

    @property
    def scored(self) -> str:
        """The text that is scored."""
        return self.text if self.answers is None else "".join(self.text[begin:end] for begin, end in self.answers)

    def cut_after(self, size: int) -> "HeldOutDocument":
        """Returns its first `size` bytes, with the answers that end in them; no pair any more if that is not all."""
        text = self.text.encode()[:size].decode(errors="ignore")
        answers = self.answers and tuple(answer for answer in self.answers if answer[1] <= len(text))
        return self._replace(text=text, answers=answers, rejected=self.rejected if text == self.text else None)


class Run:
    """The paths of a run's folder, and of its checkpoints, which may be in another place (`checkpoint.dir`)."""

    def __init__(self, folder: Path, checkpoint_dir: str | None = None):
        self.folder = folder
        self.config_file = folder / CONFIG_FILE  # the resolved config
        self.tokenizer = folder / "tokenizer"  # the run's own tokenizer, or its copy
        self.checkpoints = epath.Path(checkpoint_dir or folder / "checkpoints")  # Orbax's folder, maybe in a bucket
        self.snapshot = folder / "corpus" / "stdlib.jsonl"  # a copy of the default corpus, made when the run began
        self.held_out = folder / "held_out.jsonl"  # so that the folder is enough to evaluate the run
        self.metrics = folder / "metrics.jsonl"  # one line a step
        self.samples = folder / "samples.jsonl"  # sampled answers with their rewards, one line a step
        self.positions = folder / "positions.jsonl"  # positions in the data after some of the steps
        self.lease = folder / "lease.json"  # names the processes that write to the folder
        self.events = folder / "events.jsonl"  # the audit log, which records everything apart from steps
        self.recovery = folder / "recovery.jsonl"  # the ledger of retried and skipped batches
        self.profile = folder / "profile"  # profiler traces
        self.export = folder / "export"  # the weights for inference, written at the end

    @classmethod
    def from_config(cls, config: Config) -> "Run":
        """Returns the run that a config describes."""
        return cls(Path(config.train.run_dir).expanduser(), config.checkpoint.resolved().dir)

    @classmethod
    def load(cls, folder: Path) -> tuple["Run", Config]:
        """Returns an existing run and its config. Raises InputError as `read_config` does."""
        config = _resolved(read_config(folder))
        return cls(folder, config.checkpoint.dir), config

    def last_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None. Imported and merged weights have step 0."""
        return max(checkpoint_steps_in(self.checkpoints), default=None)

    def has_read_all(self, step: int) -> bool:
        """True if the checkpoint of a step says that its data was read to the end (`data.epochs`)."""
        file = self.checkpoints / str(step) / "progress" / "metadata"  # Orbax's name for an item of JSON
        try:
            progress = with_input_errors(self.checkpoints, lambda: parse_json(file.read_text()))
        except (OSError, ValueError):  # imported weights have none, and a damaged one says nothing
            return False
        return isinstance(progress, dict) and progress.get("is_over") is True

    def save_config(self, config: Config) -> None:
        """Writes config.json atomically."""
        with atomic_file(self.config_file) as partial:
            partial.write_text(to_json(config))

    def load_config(self) -> Config:
        """Returns the run's config. Raises InputError if the folder is not a run or its config is damaged."""
        return _resolved(read_config(self.folder))

    def held_out_texts(self) -> list[HeldOutDocument]:
        """Reads the held-out documents; none if there is no file. InputError if it is damaged."""
        remedy = "remove it, and start `ziggurat pretrain` again, which makes it again"
        records = read_whole(self.held_out, _is_document, remedy)
        for record in records:
            if "rejected" in record:
                record["rejected"] = Sequence(*record["rejected"])
        return [HeldOutDocument(**record) for record in records]

    def save_held_out(self, texts: list[HeldOutDocument]) -> None:
        """Writes the held-out documents atomically."""
        records = ({name: value for name, value in text._asdict().items() if value or name == "text"} for text in texts)
        with atomic_file(self.held_out) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))


def _resolved(config: Config) -> Config:
    """Fills in fields that a run's own version did not have yet."""
    return config.resolved(config.model.vocab_size)


def _is_document(record: Record) -> bool:
    others = ("answers", "rejected")
    texts = all(isinstance(text, str) for name, text in record.items() if name not in others)
    known = {"text"} <= record.keys() <= {"text", "prompt", "corpus", *others}
    match record.get("rejected", ["", None]):
        case [str(), answers]:
            is_rejected = answers is None or _are_spans(answers)
            return texts and known and is_rejected and _are_spans(record.get("answers", []))
    return False


def _are_spans(answers: object) -> bool:
    return isinstance(answers, list) and all(map(_is_span, answers))


def _is_span(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(at) is int and at >= 0 for at in value)
