"""Settings of the mesh, the run itself and its evaluation."""

from dataclasses import dataclass, field
from typing import Any

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
            "help": 'other mesh axes for logical axes than train/devices/rules.py has, as in {"vocabulary": []}',
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
