"""Settings of what a run does about steps that stand out. Each field's metadata is as in train/config/config.py."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RecoveryConfig:
    """What a step does whose figures stand out: it is tried again once, then its rows are left out."""

    spike_deviations: float = field(
        default=10.0,
        metadata={
            "help": "a loss so many robust standard deviations above the last ones' median stands out; 0: none does",
            "resume": "free",
        },
    )
    spike_window: int = field(
        default=128, metadata={"help": "steps whose losses a loss is compared with, from 32", "resume": "free"}
    )
    skip_batches: int = field(
        default=1,
        metadata={"help": "batches that are left out at a time, the one that stands out last", "resume": "free"},
    )
    max_skipped_batches: int = field(
        default=10, metadata={"help": "batches left out before the run ends for a person to look", "resume": "free"}
    )
    skips: dict[str, Any] = field(
        default_factory=dict,
        # What has been left out once stays so: see `train.run.ledger.Ledger`.
        metadata={
            "help": 'other batches to leave out, number of the first → how many, as in {"120": 2}; their numbers are '
            "those of the steps that would read them, were none left out",
            "resume": "free",
        },
    )

    def batches(self) -> set[int]:
        """The numbers that `skips` names."""
        return {int(first) + i for first, count in self.skips.items() for i in range(count)}

    def problems(self) -> list[str]:
        """Values that fit nothing, one line each."""
        least = {"spike_deviations": 0, "spike_window": 32, "skip_batches": 1, "max_skipped_batches": 0}
        found = [
            f"recovery.{name} is {getattr(self, name)}; it must be at least {minimum}"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        for first, count in self.skips.items():
            if not (str(first).isdigit() and int(first) and isinstance(count, int) and count > 0):
                found.append(f'recovery.skips: {first!r}: {count!r} is no step and number of batches, as in {{"9": 1}}')
        return found
