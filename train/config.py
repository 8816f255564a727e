"""The settings of a run: one dataclass a group, and how values from a preset, a file and flags become them.

The dataclasses are the only source of fields, defaults, units and documentation. Each field's metadata holds `help`
and `resume`: whether a change of it on resume is refused ("frozen", where nothing is said), accepted with a warning
("warn") or in silence ("free"). Everything wrong with a config is reported at once.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig, TokenizerConfig
from data.errors import InputError
from model.config import ModelConfig
from train.checkpoint_config import CheckpointConfig
from train.optimizer_config import OptimizerConfig
from train.recovery_config import RecoveryConfig
from train.values import from_text, from_value, kinds_of

INIT_WITH = ("all", "optimizer", "weights")


@dataclass(frozen=True)
class MeshConfig:
    """Devices of a slice on each mesh axis; −1 on one of them: all that are left."""

    slices: int | None = field(
        default=None,
        metadata={"help": "groups of devices with fast links inside; none: as the devices say", "resume": "free"},
    )
    data: int = field(default=1, metadata={"help": "copies of the model, each with its rows", "resume": "free"})
    fsdp: int = field(
        default=-1,
        metadata={"help": "devices that share rows and the storage of weights and optimizer state", "resume": "free"},
    )
    context: int = field(
        default=1,
        metadata={"help": "devices that share the positions of a row, and storage as fsdp does", "resume": "free"},
    )
    tensor: int = field(
        default=1, metadata={"help": "devices that share each product's heads, F or V", "resume": "free"}
    )
    rules: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": 'other mesh axes for logical axes than train/mesh.py has, as in {"vocabulary": []}',
            "resume": "free",
        },
    )


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    run_dir: str = field(default="runs/default", metadata={"help": "the run's folder", "resume": "free"})
    num_steps: int = field(default=1000, metadata={"help": "optimizer steps of the whole run", "resume": "warn"})
    batch_size: int = field(default=16, metadata={"help": "rows of one optimizer step, over all devices"})
    batch_ramp_start: int | None = field(
        default=None, metadata={"help": "rows of the first step, doubled until they are batch_size; none: no ramp"}
    )
    batch_ramp_steps: int | None = field(
        default=None, metadata={"help": "steps before the batch has batch_size rows, shared equally by the doublings"}
    )
    accumulation_steps: int = field(
        default=1, metadata={"help": "parts of the batch that are run one after the other", "resume": "free"}
    )
    seed: int = field(default=0, metadata={"help": "of the initial weights and the data order"})
    init_from: str | None = field(
        default=None,
        metadata={"help": "RUN@STEP: the checkpoint of another run that this one begins with; none: new weights"},
    )
    init_with: str = field(
        default="all",
        metadata={
            "help": "what of it: all (weights, optimizer, steps, place in the data), optimizer (all but that place: "
            "the data from its beginning) or weights (alone: steps from 0)",
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "moving average of the weights, which is evaluated and exported (as in 0.999); 0: none",
            "resume": "warn",
        },
    )
    log_every_steps: int = field(
        default=10, metadata={"help": "steps between two lines of a log that is no terminal", "resume": "free"}
    )
    watch_every_steps: int = field(
        default=0,
        metadata={"help": "steps between looks at each layer's activations and updates; 0: none", "resume": "free"},
    )
    profile_steps: tuple[int, int] | None = field(
        default=None,
        metadata={"help": "first and last step that are traced to run_dir/profile, as in 5,8", "resume": "free"},
    )
    tensorboard: bool = field(
        default=False,
        metadata={"help": "also write metrics for TensorBoard to run_dir/tensorboard", "resume": "free"},
    )
    wandb: str | None = field(
        default=None,
        metadata={"help": "project of Weights & Biases that gets metrics, too; none: none", "resume": "free"},
    )
    watchdog_seconds: float = field(
        default=3600.0,
        metadata={
            "help": "without a finished step, evaluation or save, after which a process shows what its threads do and "
            "ends, to be started again; 0: never",
            "resume": "free",
        },
    )
    on_event: str | None = field(
        default=None,
        metadata={"help": "shell command that gets each event of the run as JSON on its input", "resume": "free"},
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents, and the sample that comes with it."""

    every_steps: int = field(default=500, metadata={"help": "steps between evaluations", "resume": "free"})
    max_bytes: int = field(
        default=2**20, metadata={"help": "bytes of held-out documents that the run keeps and evaluates at its end"}
    )
    loop_bytes: int = field(
        default=2**17, metadata={"help": "bytes of them that it evaluates on the way", "resume": "warn"}
    )
    prompt: str = field(default="def ", metadata={"help": "what the sample continues", "resume": "free"})
    sample_tokens: int = field(default=64, metadata={"help": "new tokens of the sample", "resume": "free"})
    tasks: str | None = field(
        default=None,
        metadata={
            "help": "tasks of lm-evaluation-harness that it is evaluated on, as in hellaswag,arc_easy; none: none",
            "resume": "free",
        },
    )
    task_dir: str | None = field(
        default=None,
        metadata={"help": "folder with the tasks' YAML files; none: the harness's own", "resume": "free"},
    )
    tasks_every_steps: int = field(
        default=1000, metadata={"help": "steps between evaluations on tasks", "resume": "free"}
    )
    task_limit: int | None = field(
        default=None, metadata={"help": "documents of each task that count, at most; none: all", "resume": "free"}
    )


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


def make_config(values: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Settings from a preset's values and the command line's.

    Args:
        values: {group: {field: value}}, whatever is left out keeps its default.
        overrides: {"group.field": text}, read by the field's type; they win.

    Raises:
        InputError: every unknown name, wrong type and impossible combination, one a line.
    """
    problems: list[str] = []
    known = {f"{group}.{name}": setting for group, name, setting in config_fields()}
    chosen: dict[str, Any] = {}

    given: dict[str, Any] = {}
    for group, fields in values.items():
        if group not in {f.name for f in dataclasses.fields(Config)}:
            problems.append(f"{group}: there is no such group{nearest(group, [n.split('.')[0] for n in known])}")
        elif not isinstance(fields, Mapping):
            problems.append(f"{group} is {fields!r}; it must hold fields, as in {group}.{_first_field(known, group)}")
        else:
            given |= {f"{group}.{name}": value for name, value in fields.items()}
    for source, read in ((given, from_value), (overrides or {}, from_text)):
        for name, value in source.items():
            if name not in known:
                problems.append(f"{name}: there is no such field{nearest(name, list(known))}")
                continue
            try:
                chosen[name] = read(value, kinds_of(known[name]))
            except ValueError as error:
                problems.append(f"{name} is {value!r}; it must be {error}")

    config = _build(chosen)
    problems += config_problems(config)
    if problems:
        raise InputError("\n".join(problems))
    return config


def nearest(name: str, names: list[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    found = difflib.get_close_matches(name, sorted(set(names)), n=1, cutoff=0.6)
    if not found and "." in name:
        found = [known for known in sorted(set(names)) if known.endswith("." + name.rsplit(".", 1)[1])][:1]
    return f"; did you mean {found[0]}?" if found else ""


def _first_field(known: Mapping[str, Any], group: str) -> str:
    return next(name.split(".")[1] for name in known if name.startswith(group + "."))


def _build(chosen: Mapping[str, Any]) -> Config:
    """The dataclasses with the chosen fields."""
    groups = {}
    for group in dataclasses.fields(Config):
        own = {n.split(".")[1]: v for n, v in chosen.items() if n.split(".")[0] == group.name}
        groups[group.name] = typing.cast(type, group.type)(**own)
    return Config(**groups)


def config_problems(config: Config) -> list[str]:
    """Values that are impossible on their own or together, one line each, naming fields and a remedy."""
    c = config
    found = [*c.model.problems(), *c.data.problems(), *c.tokenizer.problems()]

    def at_least(group: str, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(getattr(c, group), name)
            if value is not None and value < minimum:
                found.append(f"{group}.{name} is {value}; it must be at least {minimum}")

    if c.model.max_positions and c.model.max_positions < c.data.segment_length:
        found.append(
            f"model.max_positions = {c.model.max_positions} is less than data.segment_length = "
            f"{c.data.segment_length}; raise it, or leave it at none"
        )
    at_least("train", 1, "num_steps", "batch_size", "batch_ramp_start", "batch_ramp_steps", "accumulation_steps",
             "log_every_steps")  # fmt: skip
    at_least("train", 0, "watch_every_steps", "watchdog_seconds")
    if c.train.profile_steps and not 1 <= c.train.profile_steps[0] <= c.train.profile_steps[1] <= c.train.num_steps:
        found.append(
            f"train.profile_steps is {c.train.profile_steps}; it must be a first and a last step from 1 to "
            f"train.num_steps = {c.train.num_steps}"
        )
    if not 0 <= c.train.seed < 2**32:
        found.append(f"train.seed is {c.train.seed}; it must be from 0 to {2**32 - 1}")
    if not 0 <= c.train.ema_decay < 1:
        found.append(f"train.ema_decay is {c.train.ema_decay}; it must be in [0, 1)")
    at_least("checkpoint", 1, "every_steps", "keep", "keep_every_steps")
    found += [*c.checkpoint.problems(), *c.recovery.problems()]
    at_least("evaluation", 1, "every_steps", "tasks_every_steps", "task_limit")
    if c.evaluation.task_dir is not None and c.evaluation.tasks is None:
        found.append("evaluation.task_dir has no effect without evaluation.tasks; name the tasks, or leave it at none")
    # The longest character.
    at_least("evaluation", 4, "max_bytes", "loop_bytes")
    at_least("evaluation", 0, "sample_tokens")
    at_least("optimizer", 0, "learning_rate", "weight_decay", "clip_norm", "warmup_steps")
    found += c.optimizer.problems(c.train.num_steps)
    for name in ("train.run_dir", "data.corpus", "evaluation.prompt"):
        group, field_name = name.split(".")
        value = getattr(getattr(c, group), field_name)
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
        except UnicodeEncodeError:
            found.append(f"{name} is not valid UTF-8")
    if not c.train.run_dir:
        found.append("train.run_dir is empty; name the run's folder")
    if c.train.accumulation_steps > 0 and c.train.batch_size % c.train.accumulation_steps:
        found.append(
            f"train.batch_size = {c.train.batch_size} does not divide by train.accumulation_steps = "
            f"{c.train.accumulation_steps}"
        )
    found += _ramp_problems(c.train) + _start_problems(c.train)
    first = "batch_size" if c.train.batch_ramp_start is None else "batch_ramp_start"
    rows = getattr(c.train, first)
    if c.num_streams > 0 and rows % c.num_streams:
        found.append(
            f"data.num_streams = {c.num_streams} does not divide train.{first} = {rows}; "
            f"nearest that does: {_nearest_divisor(rows, c.num_streams)}"
        )
    if c.evaluation.loop_bytes > c.evaluation.max_bytes:
        found.append("evaluation.loop_bytes is more than evaluation.max_bytes")
    at_least("mesh", 1, "slices")
    for axis in ("data", "fsdp", "context", "tensor"):
        if (size := getattr(c.mesh, axis)) < 1 and size != -1:
            found.append(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the devices that are left")
    if [c.mesh.data, c.mesh.fsdp, c.mesh.context, c.mesh.tensor].count(-1) > 1:
        found.append("only one of mesh.data, mesh.fsdp, mesh.context and mesh.tensor can be -1 (fsdp is by default)")
    return found


def _start_problems(c: TrainConfig) -> list[str]:
    found = []
    if c.init_with not in INIT_WITH:
        found.append(f"train.init_with is {c.init_with!r}; it must be one of {', '.join(INIT_WITH)}")
    if c.init_from is None and c.init_with != INIT_WITH[0]:
        found.append(f"train.init_with = {c.init_with} has no effect without train.init_from; leave it at all")
    if c.init_from == "":
        found.append("train.init_from is empty; it must be RUN@STEP, as in runs/tiny@500, or none")
    return found


def _ramp_problems(c: TrainConfig) -> list[str]:
    start, steps, size, parts = c.batch_ramp_start, c.batch_ramp_steps, c.batch_size, c.accumulation_steps
    if start is None or steps is None:
        both = start is None and steps is None
        return [] if both else ["train.batch_ramp_start and train.batch_ramp_steps go together: give both or neither"]
    if min(start, steps, size, parts) < 1:
        return []
    starts = [size >> k for k in range(size.bit_length()) if size % (1 << k) == 0]
    if start not in starts:
        return [
            f"train.batch_size = {size} is not train.batch_ramp_start = {start} times a power of two; "
            f"nearest start that works: {min(starts, key=lambda works: abs(works - start))}"
        ]
    found = []
    doublings = starts.index(start)
    if not doublings <= steps <= c.num_steps:
        found.append(
            f"train.batch_ramp_steps is {steps}; it must be from {doublings}, the doublings of the batch, "
            f"to train.num_steps = {c.num_steps}"
        )
    for rows in starts[:doublings]:
        if size % parts == 0 and parts * rows > size and parts * rows % size:
            found.append(
                f"train.accumulation_steps = {parts} does not cut the ramp's {rows} rows as it cuts "
                f"train.batch_size = {size}; give a power of two"
            )
    return found


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, max(number, 1) + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))


def to_json(config: Config) -> str:
    """`to_dict` as text."""
    return json.dumps(to_dict(config), indent=2) + "\n"
