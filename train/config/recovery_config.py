"""Settings of recovery from loss spikes and non-finite figures."""

import re
from dataclasses import dataclass
from typing import Any

from settings import problems_of, setting

MOST_SKIPPED = 10**6
STEP = re.compile("[1-9][0-9]{0,9}")


@dataclass(frozen=True)
class RecoveryConfig:
    """Recovery from a spike: its rows are tried again once, then they are skipped."""

    spike_deviations: float = setting(
        10.0,
        "robust standard deviations above the median of the last losses at which a loss is a spike; 0 finds none",
        resume="free",
        at_least=0,
    )
    spike_window: int = setting(
        128, "number of last losses that a loss is compared with", resume="free", at_least=32, at_most=10**6
    )
    skip_batches: int = setting(
        1,
        "batches to skip at once: the one with the spike and those before it",
        resume="free",
        at_least=1,
        at_most=MOST_SKIPPED,
    )
    max_skipped_batches: int = setting(
        10, "batches skipped before the run ends for a person to look", resume="free", at_least=0, at_most=MOST_SKIPPED
    )
    # Batches that were skipped once stay skipped: see `train.run.ledger.Ledger`.
    skips: dict[str, Any] = setting(
        {},
        'further batches to skip, number of the first → how many, as in {"120": 2}; a number is that of the step that '
        "would read the batch if none were skipped",
        resume="free",
    )

    def batches(self) -> set[int]:
        """Returns the numbers of all batches that `skips` names."""
        return {int(first) + i for first, count in self.skips.items() for i in range(count)}

    def problems(self) -> list[str]:
        """Returns one line for everything that is wrong with these values, naming the field."""
        return problems_of("recovery", self) + [
            f"recovery.skips: {first!r}: {count!r} is not a step and a number of batches up to {MOST_SKIPPED:,}, as in "
            '{"9": 1}'
            for first, count in self.skips.items()
            if not (STEP.fullmatch(str(first)) and type(count) is int and 0 < count <= MOST_SKIPPED)
        ]
