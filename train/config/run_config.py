"""Settings of the mesh, of the run itself, and of its evaluation."""

from dataclasses import dataclass
from typing import Any

from settings import problems_of, setting


@dataclass(frozen=True)
class MeshConfig:
    """Devices of a slice on each mesh axis; -1 on one axis stands for all that are left."""

    slices: int | None = setting(
        None, "groups of devices with fast links inside", unset="as the devices report", resume="free", at_least=1
    )
    data: int = setting(1, "copies of the model, each with its rows", resume="free")
    fsdp: int = setting(-1, "devices that share rows and the storage of weights and optimizer state", resume="free")
    expert: int = setting(
        1, "devices that share the experts, each of which computes its own for the tokens of all", resume="free"
    )
    context: int = setting(1, "devices that share the positions of a row, and storage as fsdp does", resume="free")
    tensor: int = setting(1, "devices that share the heads, F or V of each product", resume="free")
    rules: dict[str, Any] = setting(
        {},
        'mesh axes of logical axes other than those of train/devices/rules.py, as in {"vocabulary": []}',
        resume="free",
    )

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        problems = problems_of("mesh", self)
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "expert", "context", "tensor")}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                problems.append(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the devices that are left")
        if list(sizes.values()).count(-1) > 1:
            problems.append(
                "only one of mesh.data, mesh.fsdp, mesh.context and mesh.tensor can be -1 (fsdp is by default)"
            )
        return problems


@dataclass(frozen=True)
class TrainConfig:
    """The run itself."""

    run_dir: str = setting("runs/default", "folder of the run", resume="free")
    num_steps: int = setting(1000, "optimizer steps of the whole run", resume="warn", at_least=1)
    batch_size: int = setting(16, "rows of one optimizer step, over all devices", at_least=1, at_most=2**24)
    batch_ramp_start: int | None = setting(
        None, "rows of the first step, doubled until they are batch_size", unset="no ramp", at_least=1, at_most=2**24
    )
    batch_ramp_steps: int | None = setting(
        None, "steps until the batch has batch_size rows, shared equally by the doublings", unset="no ramp", at_least=1
    )
    accumulation_steps: int = setting(
        1, "parts of the batch that run in sequence", resume="free", at_least=1, at_most=2**24
    )
    seed: int = setting(0, "seed of the initial weights and the data order", at_least=0, at_most=2**32 - 1)
    init_from: str | None = setting(
        None, "RUN@STEP, a checkpoint of another run that this one starts from", unset="new weights"
    )
    init_with: str = setting(
        "all",
        "what is taken from init_from: all (weights, optimizer, steps and place in the data), optimizer (all but that "
        "place: the data starts over) or weights (alone: steps start at 0)",
        choices=("all", "optimizer", "weights"),
    )
    ema_decay: float = setting(
        0.0,
        "decay of the moving average of the weights that is evaluated and exported, as in 0.999; 0 keeps none",
        resume="warn",
        at_least=0,
        below=1,
    )
    log_every_steps: int = setting(
        10, "steps between two lines of a log that is not a terminal", resume="free", at_least=1
    )
    watch_every_steps: int = setting(
        0, "steps between figures of each layer's activations and updates; 0 takes none", resume="free", at_least=0
    )
    profile_steps: tuple[int, int] | None = setting(
        None, "first and last step to trace to run_dir/profile, as in 5,8", unset="no trace", resume="free"
    )
    tensorboard: bool = setting(False, "also write metrics for TensorBoard to run_dir/tensorboard", resume="free")
    wandb: str | None = setting(
        None, "project of Weights & Biases that also gets the metrics", unset="no project", resume="free"
    )
    watchdog_seconds: float = setting(
        3600.0,
        "seconds without a finished step, evaluation or save after which a process shows its threads and exits, to be "
        "started again; 0 never does",
        resume="free",
        at_least=0,
        at_most=1e6,
    )
    on_event: str | None = setting(
        None, "shell command that gets each event of the run as JSON on its input", unset="no command", resume="free"
    )

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        problems = problems_of("train", self)
        if self.profile_steps and not 1 <= self.profile_steps[0] <= self.profile_steps[1] <= self.num_steps:
            problems.append(
                f"train.profile_steps is {self.profile_steps}; it must be a first and a last step from 1 to "
                f"train.num_steps = {self.num_steps}"
            )
        if not self.run_dir:
            problems.append("train.run_dir is empty; name the run's folder")
        size, parts = self.batch_size, self.accumulation_steps
        if parts > 0 and size % parts:
            problems.append(f"train.batch_size = {size} does not divide by train.accumulation_steps = {parts}")
        if self.init_from is None and (taken := self.init_with) != "all":
            problems.append(f"train.init_with = {taken} has no effect without train.init_from; leave it at all")
        if self.init_from == "":
            problems.append("train.init_from is empty; it must be RUN@STEP, as in runs/tiny@500, or none")
        return problems + self._ramp_problems()

    def _ramp_problems(self) -> list[str]:
        start, steps = self.batch_ramp_start, self.batch_ramp_steps
        size, parts = self.batch_size, self.accumulation_steps
        if start is None and steps is None:
            return []
        if start is None or steps is None:
            return ["train.batch_ramp_start and train.batch_ramp_steps go together: give both or neither"]
        if min(start, steps, size, parts) < 1:
            return []
        starts = [size >> k for k in range(size.bit_length()) if size % (1 << k) == 0]
        if start not in starts:
            return [
                f"train.batch_size = {size} is not train.batch_ramp_start = {start} times a power of two; "
                f"nearest start that works: {min(starts, key=lambda works: abs(works - start))}"
            ]
        problems = []
        doublings = starts.index(start)
        if not doublings <= steps <= self.num_steps:
            problems.append(
                f"train.batch_ramp_steps is {steps}; it must be from {doublings}, the doublings of the batch, "
                f"to train.num_steps = {self.num_steps}"
            )
        return problems + [
            f"train.accumulation_steps = {parts} does not cut the ramp's {rows} rows as it cuts train.batch_size = "
            f"{size}; give a power of two"
            for rows in starts[:doublings]
            if size % parts == 0 and parts * rows > size and parts * rows % size
        ]


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out documents and on tasks, and the sample of each evaluation."""

    every_steps: int = setting(500, "steps between evaluations", resume="free", at_least=1)
    # At least 4 bytes, the longest character of UTF-8.
    max_bytes: int = setting(
        2**20, "bytes of held-out documents that the run keeps, and evaluates at its end", at_least=4, at_most=2**40
    )
    loop_bytes: int = setting(
        2**17, "bytes of them that it evaluates during training", resume="warn", at_least=4, at_most=2**40
    )
    prompt: str = setting("def ", "text that the sample continues", resume="free", allows_nul=True)
    sample_tokens: int = setting(64, "new tokens of the sample", resume="free", at_least=0, at_most=10_000)
    tasks: str | None = setting(
        None, "tasks of lm-evaluation-harness to evaluate on, as in hellaswag,arc_easy", unset="no tasks", resume="free"
    )
    task_dir: str | None = setting(
        None, "folder with the YAML files of the tasks", unset="those of the harness", resume="free"
    )
    tasks_every_steps: int = setting(1000, "steps between evaluations on tasks", resume="free", at_least=1)
    task_limit: int | None = setting(
        None, "largest number of documents of each task", unset="all", resume="free", at_least=1
    )

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        problems = problems_of("evaluation", self)
        if self.task_dir is not None and self.tasks is None:
            problems.append(
                "evaluation.task_dir has no effect without evaluation.tasks; name the tasks, or leave it at none"
            )
        if self.loop_bytes > self.max_bytes:
            problems.append("evaluation.loop_bytes is more than evaluation.max_bytes")
        return problems
