"""Settings of the data path: which text, how it becomes tokens, and how tokens become segments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from settings import problems_of, setting, unused_problems

# Fields of a corpus in a mixture: the text, its weight, and fields of DataConfig that it may set for itself.
TEXT_FIELDS = ("text_field", "prompt_field", "text_separator", "messages_field", "rejected_field")
PER_CORPUS_FIELDS = (*TEXT_FIELDS, "epochs", "fim_rate")
MIXTURE_FIELDS = ("corpus", "weight", *PER_CORPUS_FIELDS)
MIXTURE_EXAMPLE = '{"web": {"corpus": "web/*.jsonl", "weight": 3}, "code": {"corpus": "code", "weight": 1}}'
CORPUS_HELP = "'stdlib' (the running Python's standard library), or a file, folder, glob or URL of text"
# Fields that say which documents are filled in the middle, and how (see `data.infilling`).
FIM_FIELDS = ("fim_rate", "fim_spm_rate", "fim_tokens")
# Fields of conversations, in which the order of the data follows (see `data.conversations`).
CONVERSATION_FIELDS = ("messages_field", "train_on")
# Fields of pairs, which are part of the data's identity only where there are pairs.
PAIR_FIELDS = ("rejected_field",)
NO_CORPUS = f"data.corpus is not given; name it with --config.data.corpus=CORPUS: {CORPUS_HELP}"


@dataclass(frozen=True)
class DataConfig:
    """The corpus, and how its documents are ordered and cut into segments."""

    # A changed path alone may be the same text elsewhere: the fingerprint of the content decides on resume.
    corpus: str | dict[str, Any] | None = setting(
        None, f"{CORPUS_HELP}; or a mixture: {MIXTURE_EXAMPLE}", unset="none, which trains on nothing", resume="free"
    )
    text_field: str = setting("text", "name of the field or column that holds the text")
    prompt_field: str | None = setting(
        None, "name of a field whose text precedes the document's and is not trained on", unset="no prompt"
    )
    text_separator: str | None = setting(
        None, "line that separates the documents of a .txt", unset="each file is one document", allows_nul=True
    )
    messages_field: str | None = setting(
        None,
        "name of the field or column that holds the turns of a conversation, each with role and content",
        unset="documents are texts",
    )
    rejected_field: str | None = setting(
        None,
        "name of the field that holds the rejected answer, whose chosen one is in text_field or messages_field; each "
        "document is then a pair, for an objective that compares answers",
        unset="documents are no pairs",
    )
    # The run keeps a copy with its tokenizer, and the identity of its data has the template's hash.
    chat_template: str | None = setting(
        None,
        "file of the Jinja template that writes a conversation as text",
        unset="the tokenizer's own",
        resume="free",
    )
    train_on: str = setting(
        "answers",
        "what of a conversation is trained on: all answers of the assistant, or the last alone",
        choices=("answers", "last"),
    )
    on_bad_document: str = setting(
        "error",
        "what happens at a document that cannot be read: error ends the run, skip reports it and continues",
        resume="warn",
        choices=("error", "skip"),
    )
    validation_fraction: float = setting(
        0.05, "share of the documents that is held out for evaluation", at_least=0, below=1
    )
    epochs: int | None = setting(
        None, "passes over the corpus before the run ends", unset="as many as the steps need", at_least=1
    )
    num_streams: int | None = setting(
        None, "virtual readers, a divisor of the rows of the first batch", unset="those rows", at_least=1, at_most=2**24
    )
    chunk_bytes: int | None = setting(
        None,
        "largest part of a file, in bytes, that is read as a unit",
        unset="1 MiB; of a .jsonl or a .txt with separators 1/16,384 of the corpus, from 64 KiB to 1 MiB",
        at_least=1,
        at_most=2**40,
    )
    shuffle_window: int = setting(
        2**22, "characters of a stream's text whose documents are shuffled together", at_least=1, at_most=2**40
    )
    segment_length: int = setting(256, "positions of a segment, that is the context window", at_least=1, at_most=2**24)
    segmentation: str = setting(
        "concatenate",
        "concatenate documents and cut them; pack whole ones where they fit, and cut only long ones; or give each "
        "document a row of its own, and cut none",
        choices=("concatenate", "pack", "document"),
    )
    shuffle_rows: bool = setting(
        False, "packed rows of a window come in random order, so that a long document's are not neighbours"
    )
    document_mask: bool = setting(True, "hide the other documents of a segment from attention")
    restart_positions: bool | None = setting(
        None, "start positions at 0 in each document", unset="the value of document_mask"
    )
    train_last_position: bool = setting(
        True, "train on the last position of a segment too; otherwise the next segment begins with it"
    )
    fim_rate: float = setting(
        0.0, "share of the documents whose middle is trained on last, after prefix and suffix", at_least=0, at_most=1
    )
    fim_spm_rate: float = setting(0.5, "share of those whose suffix comes before the prefix", at_least=0, at_most=1)
    fim_tokens: str | None = setting(
        None,
        "tokens that mark prefix, suffix and middle, as in <PRE>,<SUF>,<MID>",
        unset="those that the tokenizer is known for",
    )
    num_workers: int = setting(
        0, "threads that tokenize ahead; 0: the loader's own thread does", resume="free", at_least=0, at_most=1024
    )
    prefetch: int = setting(2, "global batches prepared ahead", resume="free", at_least=1, at_most=1024)
    positions_every_steps: int = setting(
        100, "steps between lines of positions.jsonl, from which `inspect data` starts", resume="free", at_least=1
    )
    accept_changes: bool = setting(
        False, "resume with another corpus or other data settings, from a new epoch on", resume="free"
    )

    @property
    def restarts(self) -> bool:
        """True if positions start at 0 in each document."""
        return self.document_mask if self.restart_positions is None else self.restart_positions

    @property
    def fills_in(self) -> bool:
        """True if documents of some corpus may have their middle trained on last."""
        return any(self._of_corpora("fim_rate"))

    @property
    def keeps_whole(self) -> bool:
        """True if no document may be longer than a row."""
        return self.compares or self.segmentation == "document"

    @property
    def has_prompts(self) -> bool:
        """True if the documents of every corpus may begin with what is not trained on."""
        either = zip(self._of_corpora("prompt_field"), self._of_corpora("messages_field"), strict=True)
        return all(prompt or messages for prompt, messages in either)

    @property
    def converses(self) -> bool:
        """True if documents of some corpus are conversations."""
        return any(self._of_corpora("messages_field"))

    @property
    def compares(self) -> bool:
        """True if documents of some corpus are pairs of a chosen and a rejected answer."""
        return any(self._of_corpora("rejected_field"))

    def _of_corpora(self, name: str) -> list[Any]:
        """Returns the values that the corpora have of a field."""
        several = self.corpus.values() if isinstance(self.corpus, Mapping) else ()
        own = [values.get(name, getattr(self, name)) for values in several if isinstance(values, Mapping)]
        return own or [getattr(self, name)]

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        problems = problems_of("data", self)
        if self.segment_length == 1 and not self.train_last_position:
            problems.append("data.segment_length is 1; it must be at least 2")
        if self.segmentation != "pack":
            problems += unused_problems("data", self, {"shuffle_rows": f"data.segmentation = {self.segmentation}"})
        problems += _text_problems("data.", vars(self)) + self._fim_problems() + self._conversation_problems()
        problems += self._pair_problems()
        if self.corpus is not None and not self.corpus:
            problems.append(f"data.corpus is empty; give {CORPUS_HELP}")
        elif isinstance(self.corpus, Mapping):
            for name, values in self.corpus.items():
                problems += _corpus_problems(f"data.corpus[{name!r}]", values, self.rejected_field)
                if not isinstance(name, str) or not name:
                    problems.append(f"data.corpus: {name!r} is not a name; give a text")
            if not problems:
                problems += _weight_problems([stages(values.get("weight", 1)) for values in self.corpus.values()])
        return problems

    def _fim_problems(self) -> list[str]:
        if not self.fills_in:
            unused = dict.fromkeys(("fim_spm_rate", "fim_tokens"), "data.fim_rate = 0")
            return unused_problems("data", self, unused)
        names = self.fim_tokens.split(",") if self.fim_tokens is not None else []
        if self.fim_tokens is not None and (len(names) != 3 or len({*names}) < 3 or min(map(len, names)) < 2):
            # A name of one character could not be kept out of texts (see `Infilling.without_marks`).
            wanted = "three names of two characters or more, with commas between, as in <PRE>,<SUF>,<MID>"
            return [f"data.fim_tokens is {self.fim_tokens!r}; it must be {wanted}"]
        return []

    def _conversation_problems(self) -> list[str]:
        if not self.converses:
            unused = dict.fromkeys(("chat_template", "train_on"), "data.messages_field = none")
            return unused_problems("data", self, unused)
        if self.messages_field is not None and self.prompt_field is not None and not self.compares:
            return ["data.prompt_field is not used with data.messages_field, whose turns are the prompts; leave it out"]
        return []

    def _pair_problems(self) -> list[str]:
        if not self.compares:
            return []
        problems = []
        if not all(self._of_corpora("rejected_field")):
            problems.append(
                "data.rejected_field: some corpora of the mixture hold pairs and some do not; give it to all, or train "
                "on the others in a run of their own"
            )
        if self.segmentation != "pack":
            problems.append(
                f"data.segmentation is {self.segmentation}; with data.rejected_field it must be pack, so that "
                "no pair is cut"
            )
        if not (self.document_mask and self.restarts):
            problems.append(
                "data.rejected_field needs data.document_mask and data.restart_positions, so that neither answer of a "
                "pair sees the other; leave both at their defaults"
            )
        unused = {"train_on": "data.rejected_field, since the last answers are compared"} if self.converses else {}
        unused |= {"fim_rate": "data.rejected_field"}
        return problems + unused_problems("data", self, unused)


class ResolvedDataConfig(DataConfig):
    """Resolved settings of the data. The annotation narrows the type of `DataConfig`, for type checkers alone."""

    num_streams: int


def stages(weight: Any) -> list[tuple[int, float]]:
    """Returns a corpus's weight as stages (first step, weight), in order from step 0."""
    return [(step, float(w)) for step, w in weight] if isinstance(weight, list | tuple) else [(0, float(weight))]


def weight_at(step: int, weights: Sequence[tuple[int, float]]) -> float:
    """Returns the weight of a corpus with these `stages` at a step."""
    return next(weight for since, weight in reversed(weights) if since <= step)


def _weight_problems(corpora: Sequence[Sequence[tuple[int, float]]]) -> list[str]:
    """Returns a line that names the first step from which every weight is 0, if there is one."""
    for step in sorted({step for weights in corpora for step, _ in weights}):
        if not any(weight_at(step, weights) for weights in corpora):
            return [f"data.corpus: from step {step} on every weight is 0; give one corpus more"]
    return []


def _text_problems(where: str, values: Mapping[str, Any]) -> list[str]:
    """Returns one line for each text field that cannot be used. All but `text_field` may be None."""
    problems = []
    for name in TEXT_FIELDS:
        if name not in values or (values[name] is None and name != "text_field"):
            continue
        value = values[name]
        if not isinstance(value, str) or not value:
            problems.append(f"{where}{name} is {value!r}; it must be a text")
        elif name == "text_separator" and "\n" in value:
            problems.append(f"{where}{name} is {value!r}; it must be one line")
    return problems


def _corpus_problems(where: str, values: Any, rejected_field: str | None) -> list[str]:
    """Returns one line for everything that is wrong with one corpus of a mixture, given the field of all corpora."""
    if not isinstance(values, Mapping):
        return [f"{where} is {values!r}; it must hold fields, as in {MIXTURE_EXAMPLE}"]
    unknown = [name for name in values if name not in MIXTURE_FIELDS]
    problems = [f"{where}: unknown field {name!r}; a corpus has {', '.join(MIXTURE_FIELDS)}" for name in unknown]
    if not isinstance(values.get("corpus"), str) or not values["corpus"]:
        problems.append(f"{where} has no 'corpus'; give {CORPUS_HELP}")
    problems += _text_problems(f"{where}: ", values)
    is_pair = values.get("rejected_field", rejected_field) is not None
    if values.get("messages_field") and values.get("prompt_field") and not is_pair:
        problems.append(
            f"{where}: prompt_field is not used with messages_field, whose turns are the prompts; leave it out"
        )
    epochs = values.get("epochs")
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        problems.append(f"{where}: epochs is {epochs!r}; it must be a whole number of at least 1, or left out")
    rate = values.get("fim_rate", 0)
    if type(rate) not in (int, float) or not 0 <= rate <= 1:
        problems.append(f"{where}: fim_rate is {rate!r}; it must be a number from 0 to 1")
    weight = values.get("weight", 1)
    if not _is_weight(weight) and not _is_schedule(weight):
        problems.append(
            f"{where}: weight is {weight!r}; it must be a number from 1e-4 to 1e4, or a schedule "
            "[[0, weight], [step, weight], ...] of steps that rise from 0 and such weights or 0"
        )
    return problems


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 1e-4 <= value <= 1e4


def _is_schedule(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False
    if not all(isinstance(stage, list | tuple) and len(stage) == 2 for stage in value):
        return False
    steps = [step for step, _ in value]
    weights = [weight for _, weight in value]
    return (
        all(type(step) is int for step in steps)
        and steps[:1] == [0]
        and steps == sorted(set(steps))
        and all(weight == 0 or _is_weight(weight) for weight in weights)
        and any(weights)
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece BPE tokenizer, and the sample of the corpus that it is trained on."""

    path: str | None = setting(
        None,
        "folder of a tokenizer made by `ziggurat tokenize`, or of another's tokenizer.json",
        unset="the run trains its own",
        resume="free",
    )
    vocab_size: int = setting(
        4096, "pieces asked of the tokenizer; a small corpus gets as many as it supports", at_least=320, at_most=2**24
    )
    sample_bytes: int = setting(2**23, "bytes of training documents that it learns from", at_least=1024, at_most=2**40)

    def problems(self) -> list[str]:
        """Returns one line for every value that is out of bounds, naming the field."""
        return problems_of("tokenizer", self)
