"""Settings of the optimizer and of its schedule."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from settings import problems_of, setting, unused_problems

MOMENTUM = ("muon_momentum", "muon_momentum_start", "muon_momentum_warmup_steps")
DECAY = ("weight_decay", "weight_decay_schedule", "cautious_weight_decay")
_SOAP = ("beta2", "epsilon", "soap_every_steps", "soap_max_dim")
# Rules of update, with the fields that not every rule uses.
USED_BY_RULE = {
    "adamw": ("beta1", "beta2", "epsilon"),
    "lion": ("beta1", "beta2"),
    "adafactor": (),
    "muon": MOMENTUM,
    "normuon": (*MOMENTUM, "beta2"),
    "soap": ("beta1", *_SOAP),
    "soap_muon": (*MOMENTUM, *_SOAP),
}
# The rules of matrices and of all other parameters, by the choice of `optimizer.name`.
RULES = {
    "adamw": ("adamw", "adamw"),
    "lion": ("lion", "lion"),
    "adafactor": ("adafactor", "adafactor"),
    "muon": ("muon", "adamw"),
    "normuon": ("normuon", "adamw"),
    "soap": ("soap", "adamw"),
    "soap_muon": ("soap_muon", "adamw"),
}
# Fields without effect, by the choice of `optimizer.schedule`.
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
        "adamw",
        "optimizer; those with muon or soap in their names use AdamW for all parameters but matrices",
        choices=tuple(RULES),
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
    muon_momentum_start: float | None = setting(
        None, "the same in the first step", unset="muon_momentum throughout", resume="warn", at_least=0, below=1
    )
    muon_momentum_warmup_steps: int = setting(
        300, "steps of a linear rise from muon_momentum_start to muon_momentum", resume="warn", at_least=1
    )
    epsilon: float = setting(1e-8, "added to the root of the gradient's square", resume="warn", above=0)
    moment_dtype: str = setting(
        "float32",
        "dtype in which the optimizer stores moments; it computes in float32",
        choices=("float32", "bfloat16"),
    )
    weight_decay: float = setting(
        0.1, "decay of matrices, times the learning rate; norms have none", resume="warn", at_least=0
    )
    weight_decay_schedule: str = setting(
        "rate",
        "decay in a step: rate is weight_decay × learning rate; corrected multiplies that by the rate's share of its "
        "peak, linear and cosine by a factor that falls from 1 to 0 over the run",
        resume="warn",
        choices=("rate", "corrected", "linear", "cosine"),
    )
    cautious_weight_decay: bool = setting(
        False, "decay only elements that the update brings nearer to zero", resume="warn"
    )
    soap_every_steps: int = setting(
        10, "steps between updates of soap's bases of eigenvectors", resume="warn", at_least=1
    )
    soap_max_dim: int = setting(10_000, "largest side of a matrix that soap preconditions", at_least=1)
    clip_norm: float = setting(1.0, "largest global norm of the gradient; 0 sets no limit", resume="warn", at_least=0)

    groups: dict[str, Any] = setting(
        {},
        "settings of some parameters, by their role or a pattern of their names, as in "
        '{"embedding": {"learning_rate": 0.02}, "blocks.attention.*": {"weight_decay": 0}}',
        resume="warn",
    )

    def steps_of_warmup(self, num_steps: int) -> int:
        """Returns the steps of warm-up in a run of `num_steps`: as set, or 5% of the run, at most 2000."""
        return min(num_steps // 20, 2000) if self.warmup_steps is None else self.warmup_steps

    def problems(self, num_steps: int) -> list[str]:
        """Returns one line for everything that is wrong with these values in a run of `num_steps`, naming the field.

        What `groups` hold is checked by `train.config.parameter_groups`.
        """
        changed = {field for group in self.groups.values() if isinstance(group, dict) for field in group}
        unused = self.unused(RULES.get(self.name, ()), changed)
        return self.value_problems("optimizer", num_steps, unused) + unused_problems("optimizer", self, unused)

    def unused(self, rules: Collection[str], changed: Collection[str] = ()) -> dict[str, str]:
        """Returns the fields that have no effect with these rules, and the choice that makes each useless.

        Args:
            changed: fields whose values are not the same for all parameters.
        """
        unused: dict[str, str] = {}
        if rules:
            of_rules = {field for fields in USED_BY_RULE.values() for field in fields}
            used = {field for rule in rules for field in USED_BY_RULE[rule]}
            unused |= dict.fromkeys(sorted(of_rules - used), self.name)
        if "schedule" not in changed:
            unused |= dict.fromkeys(UNUSED_BY_SCHEDULE.get(self.schedule, ()), f"the schedule {self.schedule}")
        if self.weight_decay == 0 and "weight_decay" not in changed:
            unused |= dict.fromkeys(("weight_decay_schedule", "cautious_weight_decay"), "weight_decay = 0")
        if self.muon_momentum_start is None and "muon_momentum_start" not in changed:
            unused.setdefault("muon_momentum_warmup_steps", "muon_momentum_start = none")
        return unused

    def value_problems(self, name: str, num_steps: int, unused: Collection[str] = ()) -> list[str]:
        """Returns one line for every value that is impossible in a run of `num_steps`.

        Args:
            name: what has these settings, as in "optimizer".
            unused: fields whose values do not matter.
        """
        problems = problems_of(name, self)
        warmup = self.steps_of_warmup(num_steps)
        if self.schedule == "inverse_sqrt" and warmup < 1:
            problems.append(f"inverse_sqrt falls from the end of warm-up; give {name}.warmup_steps of at least 1")
        if warmup >= num_steps > 0:
            problems.append(
                f"{name}.warmup_steps = {warmup} leave none of train.num_steps = {num_steps} at the peak; lower them"
            )
        if self.moment_dtype == "bfloat16":
            problems += self._bfloat16_problems(name, num_steps, unused)
        return problems

    def _bfloat16_problems(self, name: str, num_steps: int, unused: Collection[str]) -> list[str]:
        # There are 2⁷ bfloat16 values between two powers of 2, so a change by less than 2⁻⁸ of a value can round away.
        most = 1 - 2**-8
        why = "moments in bfloat16 cannot fall by less than 1/256 of their size in a step"
        problems = [
            f"{name}.{field} is {value:.6g}; {why}: give at most {most:.4f}, or optimizer.moment_dtype=float32"
            for field in ("beta1", "beta2", "muon_momentum", "muon_momentum_start")
            if field not in unused and (value := getattr(self, field)) is not None and most < value < 1
        ]
        if self.name == "adafactor" and num_steps > 0 and 1 - num_steps**-0.8 > most:
            problems.append(
                f"adafactor's decay grows beyond {most:.4f} in train.num_steps = {num_steps}; {why}: "
                "give optimizer.moment_dtype=float32"
            )
        return problems


# Fields that a group may set: all but those of the whole optimizer.
OF_ALL = ("name", "moment_dtype", "clip_norm", "soap_every_steps", "soap_max_dim", "groups")
OF_GROUPS = {field.name: field for field in dataclasses.fields(OptimizerConfig) if field.name not in OF_ALL}
