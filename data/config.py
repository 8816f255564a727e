"""Settings of the data path: which text, how it becomes tokens, how tokens become segments.

Each field's metadata holds `help` (one line, with units) and `resume`: what a change of the field does when a run is
resumed. "frozen" (where nothing is said) is refused, "warn" is accepted with a warning, "free" in silence.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Fields of a mixture's corpus: what it is, how often it is drawn, and those of DataConfig that it may have of its own.
PER_CORPUS_FIELDS = ("text_field", "prompt_field", "text_separator", "epochs")
MIXTURE_FIELDS = ("corpus", "weight", *PER_CORPUS_FIELDS)
MIXTURE_EXAMPLE = '{"web": {"corpus": "web/*.jsonl", "weight": 3}, "code": {"corpus": "code", "weight": 1}}'
CORPUS_HELP = "'stdlib' (the running Python's standard library), or a file, folder, glob or URL of text"


@dataclass(frozen=True)
class DataConfig:
    """The corpus, and how its documents are ordered and cut into segments."""

    corpus: str | dict[str, Any] = field(
        default="stdlib",
        # The fingerprint of the content decides, not the path.
        metadata={"help": f"{CORPUS_HELP}; or a mixture: {MIXTURE_EXAMPLE}", "resume": "free"},
    )
    text_field: str = field(default="text", metadata={"help": "name of the text's field or column"})
    prompt_field: str | None = field(
        default=None,
        metadata={"help": "name of a field whose text stands before the document's and is not trained on; none: none"},
    )
    text_separator: str | None = field(
        default=None,
        metadata={"help": "the line between two documents of a .txt; none: each file is a document"},
    )
    on_bad_document: str = field(
        default="error",
        metadata={
            "help": "what a document that cannot be read does: 'error' ends the run, 'skip' leaves it out and says so",
            "resume": "warn",
        },
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "part of the documents that is held out for evaluation"}
    )
    epochs: int | None = field(
        default=None,
        metadata={"help": "times that the corpus is read before the run ends; none: as often as the steps need"},
    )
    num_streams: int | None = field(
        default=None, metadata={"help": "virtual readers; divides the rows of the first batch; none: equals them"}
    )
    chunk_bytes: int = field(default=2**20, metadata={"help": "largest part of a file, in bytes, that is read as one"})
    shuffle_window: int = field(
        default=2**22, metadata={"help": "characters of a stream's text whose documents are shuffled together"}
    )
    segment_length: int = field(default=256, metadata={"help": "positions of a segment: the context window"})
    segmentation: str = field(
        default="concatenate",
        metadata={
            "help": "'concatenate' documents and cut them, or 'pack' whole ones as they fit, cutting only long ones"
        },
    )
    document_mask: bool = field(default=True, metadata={"help": "hide other documents of a segment from attention"})
    restart_positions: bool | None = field(
        default=None, metadata={"help": "positions begin at 0 in each document; none: as document_mask"}
    )
    train_last_position: bool = field(
        default=True,
        metadata={"help": "train on a segment's last position too; else the next segment begins with it"},
    )
    num_workers: int = field(
        default=0,
        metadata={"help": "processes that tokenize; 0: the loader's own thread does", "resume": "free"},
    )
    prefetch: int = field(default=2, metadata={"help": "global batches made ready ahead", "resume": "free"})
    positions_every_steps: int = field(
        default=100,
        metadata={
            "help": "steps between lines of positions.jsonl, where `inspect data` begins",
            "resume": "free",
        },
    )
    accept_changes: bool = field(
        default=False,
        metadata={"help": "resume with another corpus or other data settings, from a new epoch on", "resume": "free"},
    )

    @property
    def restarts(self) -> bool:
        """Whether positions begin at 0 in each document."""
        return self.document_mask if self.restart_positions is None else self.restart_positions

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        for name in ("chunk_bytes", "shuffle_window", "prefetch", "positions_every_steps"):
            if getattr(self, name) < 1:
                found.append(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.segment_length < (least := 1 if self.train_last_position else 2):
            found.append(f"data.segment_length is {self.segment_length}; it must be at least {least}")
        for name in ("num_streams", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_workers < 0:
            found.append(f"data.num_workers is {self.num_workers}; it must be 0 or more")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}; it must be in [0, 1)")
        for name, choices in (("on_bad_document", ("error", "skip")), ("segmentation", ("concatenate", "pack"))):
            if getattr(self, name) not in choices:
                found.append(f"data.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for name in ("text_field", "prompt_field", "text_separator"):
            if problem := _text_problem(name, getattr(self, name)):
                found.append(f"data.{name} {problem}")
        if not self.corpus:
            found.append(f"data.corpus is empty; give {CORPUS_HELP}")
        elif isinstance(self.corpus, Mapping):
            for name, values in self.corpus.items():
                found += _corpus_problems(f"data.corpus[{name!r}]", values)
                if not isinstance(name, str) or not name:
                    found.append(f"data.corpus: {name!r} is no name; give a text")
            if not found:
                found += _weight_problems([stages(values.get("weight", 1)) for values in self.corpus.values()])
        return found


def stages(weight: Any) -> list[tuple[int, float]]:
    """A corpus's weight as (step, weight from it on), by step from 0."""
    return [(step, float(w)) for step, w in weight] if isinstance(weight, list | tuple) else [(0, float(weight))]


def weight_at(step: int, weights: Sequence[tuple[int, float]]) -> float:
    """Of a corpus with these `stages`."""
    return next(weight for since, weight in reversed(weights) if since <= step)


def _weight_problems(corpora: Sequence[Sequence[tuple[int, float]]]) -> list[str]:
    """Steps from which on nothing has a weight."""
    steps = sorted({step for weights in corpora for step, _ in weights})
    return [
        f"data.corpus: from step {step} on every weight is 0; give one corpus more"
        for step in steps
        if not any(weight_at(step, weights) for weights in corpora)
    ][:1]


def _text_problem(name: str, value: Any) -> str | None:
    """What is wrong with a field that is a text or, but for `text_field`, none."""
    if value is None and name != "text_field":
        return None
    if not isinstance(value, str) or not value:
        return f"is {value!r}; it must be a text"
    if name == "text_separator" and "\n" in value:
        return f"is {value!r}; it must be one line"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    return None


def _corpus_problems(where: str, values: Any) -> list[str]:
    """What is wrong with one corpus of a mixture."""
    if not isinstance(values, Mapping):
        return [f"{where} is {values!r}; it must hold fields, as in {MIXTURE_EXAMPLE}"]
    found = [
        f"{where}: there is no field {name!r}; there are {', '.join(MIXTURE_FIELDS)}"
        for name in values
        if name not in MIXTURE_FIELDS
    ]
    if not isinstance(values.get("corpus"), str) or not values["corpus"]:
        found.append(f"{where} has no 'corpus'; give {CORPUS_HELP}")
    problems = {
        name: _text_problem(name, values[name])
        for name in ("text_field", "prompt_field", "text_separator")
        if name in values
    }
    found += [f"{where}: {name} {problem}" for name, problem in problems.items() if problem]
    if not _is_count(values.get("epochs", 1)):
        found.append(f"{where}: epochs is {values['epochs']!r}; it must be a whole number from 1 on, or left out")
    weight = values.get("weight", 1)
    if not _is_weight(weight) and not _is_schedule(weight):
        found.append(
            f"{where}: weight is {weight!r}; it must be a number from 1e-4 to 1e4, or a schedule "
            "[[0, weight], [step, weight], ...] of steps that rise from 0 and such weights or 0"
        )
    return found


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _is_weight(value: Any, least: float = 1e-4) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= 1e4


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    if not all(isinstance(stage, list | tuple) and len(stage) == 2 for stage in value):
        return False
    steps = [step for step, _ in value]
    return (
        all(isinstance(step, int) and not isinstance(step, bool) for step in steps)
        and steps[0] == 0
        and all(one < other for one, other in itertools.pairwise(steps))
        and all(weight == 0 or _is_weight(weight) for _, weight in value)
        and any(weight > 0 for _, weight in value)
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece BPE tokenizer, and the sample of the corpus that it is trained on."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "folder of a tokenizer made by `ziggurat tokenize`, or with another's tokenizer.json; none: the "
            "run trains its own",
            "resume": "free",
        },
    )
    vocab_size: int = field(
        default=4096,
        metadata={"help": "pieces asked of the tokenizer; a small corpus gets as many as it supports"},
    )
    sample_bytes: int = field(default=2**23, metadata={"help": "bytes of training documents that it learns from"})

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        if self.vocab_size < 320:
            found.append(
                f"tokenizer.vocab_size is {self.vocab_size}; it must be at least 320: 256 bytes, "
                "the special pieces and some text"
            )
        if self.sample_bytes < 1024:
            found.append(f"tokenizer.sample_bytes is {self.sample_bytes}; it must be at least 1024")
        return found
