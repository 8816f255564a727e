"""A run that is ill-treated 60 times, beside one that is not.

    python -m tests.benchmarks.chaos

In the first half the run keeps its two processes, and must end with the very bits of the undisturbed run; in the
second it moves from 4 processes to 2, to 1 and to 4 again, and must see the same data, with a loss curve as near as
docs/tolerances.md says. Half an hour on two cores. The last line is one JSON object; the status is 1 if anything
differs.
"""

import collections
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.meshes import BOUNDS
from tests.chaos import FAULTS, Chaos, same_curve
from tests.launch.test_pretrain import assert_same_end
from train.run.events import read_events
from train.run.goodput import goodput

ROUNDS, STEPS_A_FAULT = 3, 60


def ill_treated(folder: Path, processes: list[int], seed: int) -> tuple[Chaos, collections.Counter[str]]:
    """A run through every fault, `ROUNDS` times in random order, to its end."""
    chaos = Chaos(folder, processes, None, ROUNDS * len(FAULTS) * STEPS_A_FAULT, seed)
    faults = [fault for fault in FAULTS for _ in range(ROUNDS)]
    chaos.chance.shuffle(faults)
    chaos.start()
    for i, fault in enumerate(faults):
        begun = time.monotonic()
        chaos.suffer(fault)
        print(f"{i + 1:3}  {fault:22} step {chaos.step():5}  {time.monotonic() - begun:4.0f} s", flush=True)
    chaos.to_the_end()
    return chaos, collections.Counter(faults)


def main() -> int:
    result: dict[str, object] = {}
    try:
        for name, processes in (("fixed", [2]), ("moving", [4, 2, 1, 4])):
            with tempfile.TemporaryDirectory() as folder:
                chaos, faults = ill_treated(Path(folder), processes, seed=len(processes))
                straight = chaos.straight(processes[0] if name == "fixed" else 1)
                difference, events = same_curve(chaos.run, straight), chaos.events()
                if name == "fixed":
                    assert_same_end(chaos.run, straight, chaos.steps)
                    assert difference == 0
                else:
                    assert difference <= BOUNDS["chaos"]["loss"], difference
                counts = collections.Counter(event["event"] for event in events)
                seconds = goodput(read_events(chaos.run / "events.jsonl"))
                result[name] = {
                    "faults": faults.total(), "steps": chaos.steps, "worst_loss_difference": difference,
                    "events": counts, "seconds": {kind: round(value, 1) for kind, value in seconds.items()},
                }  # fmt: skip
                print(f"{name}: {faults.total()} faults, {chaos.steps} steps, loss differs by {difference:.1e} at most")
    except AssertionError as error:
        print(error, file=sys.stderr)
        result["error"] = str(error)
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
