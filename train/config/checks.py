"""Finds everything that is wrong with a config."""

import json

from train.config.config import Config
from train.config.run_config import INIT_WITH, TrainConfig


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
