"""Settings of the optimizer and of its schedule."""

from collections.abc import Mapping
from dataclasses import dataclass

from settings import problems_of, setting, unused_problems

# Fields without effect, by the choice of `optimizer.name` and of `optimizer.schedule`.
UNUSED_BY_OPTIMIZER = {
    "adamw": ("muon_momentum",),
    "lion": ("muon_momentum", "epsilon"),
    "adafactor": ("muon_momentum", "epsilon", "beta1", "beta2"),
    "muon": (),
}
UNUSED_BY_SCHEDULE = {
    "cosine": ("decay_fraction",),
    "linear": ("decay_fraction",),
    "wsd": (),
    "inverse_sqrt": ("decay_fraction", "final_fraction"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its learning rate over the steps."""

    name: str = setting(
        "adamw", "optimizer; muon uses AdamW for all parameters but matrices", choices=tuple(UNUSED_BY_OPTIMIZER)
    )
    learning_rate: float = setting(3e-4, "peak of the schedule", resume="warn", at_least=0)
    schedule: str = setting(
        "cosine",
        "learning rate after warm-up; wsd is stable, then a linear decay",
        resume="warn",
        choices=tuple(UNUSED_BY_SCHEDULE),
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up", unset="5% of the run, at most 2000", resume="warn", at_least=0
    )
    decay_fraction: float = setting(
        0.2, "share of the run, at its end, that is the decay of wsd", resume="warn", at_least=0, at_most=1
    )
    final_fraction: float = setting(
        0.1, "learning rate at the end, as a share of the peak", resume="warn", at_least=0, at_most=1
    )
    beta1: float = setting(0.9, "decay of the gradient's mean", resume="warn", at_least=0, below=1)
    beta2: float = setting(
        0.95, "decay of the gradient's square, or of lion's momentum", resume="warn", at_least=0, below=1
    )
    muon_momentum: float = setting(0.95, "decay of muon's momentum", resume="warn", at_least=0, below=1)
    epsilon: float = setting(1e-8, "added to the root of the gradient's square", resume="warn", above=0)
    moment_dtype: str = setting(
        "float32",
        "dtype in which the optimizer stores moments; it computes in float32",
        choices=("float32", "bfloat16"),
    )
    weight_decay: float = setting(
        0.1, "decay of matrices, times the learning rate; norms have none", resume="warn", at_least=0
    )
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 sets no limit", resume="warn", at_least=0)

    def steps_of_warmup(self, num_steps: int) -> int:
        """Returns the steps of warm-up in a run of `num_steps`: as set, or 5% of the run, at most 2000."""
        return min(num_steps // 20, 2000) if self.warmup_steps is None else self.warmup_steps

    def problems(self, num_steps: int) -> list[str]:
        """Returns one line for everything that is wrong with these values in a run of `num_steps`, naming the field."""
        unused = dict.fromkeys(UNUSED_BY_OPTIMIZER.get(self.name, ()), self.name)
        unused |= dict.fromkeys(UNUSED_BY_SCHEDULE.get(self.schedule, ()), f"the schedule {self.schedule}")
        problems = problems_of("optimizer", self) + unused_problems("optimizer", self, unused)
        warmup = self.steps_of_warmup(num_steps)
        if self.schedule == "inverse_sqrt" and warmup < 1:
            problems.append("inverse_sqrt falls from the end of warm-up; give optimizer.warmup_steps of at least 1")
        if warmup >= num_steps > 0:
            problems.append(
                f"optimizer.warmup_steps = {warmup} leave none of train.num_steps = {num_steps} at the peak; lower them"
            )
        if self.moment_dtype == "bfloat16":
            problems += self._bfloat16_problems(num_steps, unused)
        return problems

    def _bfloat16_problems(self, num_steps: int, unused: Mapping[str, str]) -> list[str]:
        # There are 2⁷ bfloat16 values between two powers of 2, so a change by less than 2⁻⁸ of a value can round away.
        most = 1 - 2**-8
        why = "moments in bfloat16 cannot fall by less than 1/256 of their size in a step"
        problems = [
            f"optimizer.{name} is {getattr(self, name):.6g}; {why}: give at most {most:.4f}, "
            "or optimizer.moment_dtype=float32"
            for name in ("beta1", "beta2", "muon_momentum")
            if name not in unused and most < getattr(self, name) < 1
        ]
        if self.name == "adafactor" and num_steps > 0 and 1 - num_steps**-0.8 > most:
            problems.append(
                f"adafactor's decay grows beyond {most:.4f} in train.num_steps = {num_steps}; {why}: "
                "give optimizer.moment_dtype=float32"
            )
        return problems
