"""Settings of the optimizer and of its schedule.

Each field's metadata holds `help` (one line) and `resume`, as in train/config/config.py.
"""

import dataclasses
from dataclasses import dataclass, field

# Fields that have no effect with a choice of `optimizer.name` and of `optimizer.schedule`.
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
DECAYS = ("beta1", "beta2", "muon_momentum")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its learning rate over the steps."""

    name: str = field(
        default="adamw",
        metadata={"help": "adamw, lion, adafactor, or muon (AdamW for all but matrices)"},
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "the peak of the schedule", "resume": "warn"})
    schedule: str = field(
        default="cosine",
        metadata={
            "help": "after warm-up: cosine, linear, wsd (stable, then a linear decay) or inverse_sqrt",
            "resume": "warn",
        },
    )
    warmup_steps: int | None = field(
        default=None, metadata={"help": "steps of linear warm-up; none: 5% of the run, at most 2000", "resume": "warn"}
    )
    decay_fraction: float = field(
        default=0.2, metadata={"help": "the part of the run at its end that is wsd's decay", "resume": "warn"}
    )
    final_fraction: float = field(
        default=0.1, metadata={"help": "learning rate at the end, as a part of the peak", "resume": "warn"}
    )
    beta1: float = field(default=0.9, metadata={"help": "decay of the gradient's mean", "resume": "warn"})
    beta2: float = field(
        default=0.95, metadata={"help": "decay of the gradient's square; of lion's momentum", "resume": "warn"}
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "decay of muon's momentum", "resume": "warn"})
    epsilon: float = field(default=1e-8, metadata={"help": "added to the root of the square", "resume": "warn"})
    moment_dtype: str = field(
        default="float32",
        metadata={"help": "float32 or bfloat16, for what the optimizer remembers of gradients; it computes in float32"},
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "of matrices, times the learning rate; norms have none", "resume": "warn"}
    )
    clip_norm: float = field(
        default=1.0, metadata={"help": "largest global norm of the gradient; 0: no limit", "resume": "warn"}
    )

    def steps_of_warmup(self, num_steps: int) -> int:
        """Steps of warm-up in a run of so many: as given, or 5% of it, at most 2000."""
        return min(num_steps // 20, 2000) if self.warmup_steps is None else self.warmup_steps

    def problems(self, num_steps: int) -> list[str]:
        """Everything wrong with these values in a run of so many steps, one line each, naming the field."""
        found = []
        choices = {
            "name": tuple(UNUSED_BY_OPTIMIZER),
            "schedule": tuple(UNUSED_BY_SCHEDULE),
            "moment_dtype": MOMENT_DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"optimizer.{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in DECAYS:
            if not 0 <= getattr(self, name) < 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.epsilon <= 0:
            found.append(f"optimizer.epsilon is {self.epsilon}; it must be above 0")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1]")

        unused = dict.fromkeys(UNUSED_BY_OPTIMIZER.get(self.name, ()), self.name)
        unused |= dict.fromkeys(UNUSED_BY_SCHEDULE.get(self.schedule, ()), f"the schedule {self.schedule}")
        for setting in dataclasses.fields(self):
            if setting.name in unused and getattr(self, setting.name) != setting.default:
                with_what, default = unused[setting.name], "none" if setting.default is None else setting.default
                found.append(f"optimizer.{setting.name} has no effect with {with_what}; leave it at {default}")
        warmup = self.steps_of_warmup(num_steps)
        if self.schedule == "inverse_sqrt" and warmup < 1:
            found.append("inverse_sqrt falls from the end of warm-up; give optimizer.warmup_steps of at least 1")
        if warmup >= num_steps > 0:
            found.append(
                f"optimizer.warmup_steps = {warmup} leave none of train.num_steps = {num_steps} at the peak; lower them"
            )
        if self.moment_dtype == "bfloat16":
            # Between two powers of 2 there are 2⁷ bfloat16: what changes by less than 2⁻⁸ of itself can round back.
            most, why = 1 - 2**-8, "moments in bfloat16 cannot fall by less than 1/256 of their size in a step"
            found += [
                f"optimizer.{name} is {getattr(self, name):.6g}; {why}: give at most {most:.4f}, "
                "or optimizer.moment_dtype=float32"
                for name in DECAYS
                if name not in unused and most < getattr(self, name) < 1
            ]
            if self.name == "adafactor" and num_steps > 0 and 1 - num_steps**-0.8 > most:
                found.append(
                    f"adafactor's decay grows beyond {most:.4f} in train.num_steps = {num_steps}; {why}: "
                    "give optimizer.moment_dtype=float32"
                )
        return found
