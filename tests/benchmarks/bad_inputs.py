"""Bad inputs to every command, drawn at random: a traceback, a hang, a wrong status or a changed file is a failure.

    python -m tests.benchmarks.bad_inputs             # 600 inputs: ten minutes on two cores
    python -m tests.benchmarks.bad_inputs 50 --seed=7

tests/bad_inputs.py says what is drawn. Each failure is printed with the command that shows it and the end of its
output. The last line is one JSON object; the status is 1 where anything failed.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.bad_inputs import KINDS, Fuzzer, Outcome


def run_one(fuzzer: Fuzzer, number: int, seed: int, kind: str | None) -> Outcome:
    """Draws and runs case `number`; the same number and seed draw the same case."""
    return fuzzer.run(fuzzer.draw(random.Random(f"{seed}/{number}"), kind), number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=600, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--kind", choices=[kind.__name__ for kind in KINDS], help="draw inputs of this kind alone")
    parser.add_argument("--run-files", type=int, default=0, help="how many more inputs of the kind bad_run_file")
    arguments = parser.parse_args()
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    cases = [(number, arguments.kind) for number in numbers]
    cases += [(number, "bad_run_file") for number in range(arguments.count, arguments.count + arguments.run_files)]
    os.environ["JAX_PLATFORMS"] = "cpu"
    begun = time.monotonic()
    endings: dict[str, collections.Counter[int | None]] = collections.defaultdict(collections.Counter)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder).resolve())
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
            outcomes = [pool.submit(run_one, fuzzer, number, arguments.seed, kind) for number, kind in cases]
            for (number, _), future in zip(cases, outcomes, strict=True):
                outcome = future.result()
                endings[outcome.kind][outcome.status] += 1
                if outcome.problem or arguments.only is not None:
                    failures += 1
                    what = f"{outcome.kind}: {outcome.detail}"
                    print(f"{number}: {outcome.problem} ({outcome.seconds:.0f} s): {what}")
                    print(f"   ziggurat {' '.join(word[:80] for word in outcome.command)}")
                    print("   | " + "\n   | ".join(outcome.output.splitlines()[-8:]), flush=True)
    print("kind         inputs  done  refused")
    for kind, statuses in sorted(endings.items()):
        print(f"{kind:12} {statuses.total():6} {statuses[0]:5} {statuses[2]:8}")
    seconds = round(time.monotonic() - begun)
    print(json.dumps({"inputs": sum(s.total() for s in endings.values()), "failures": failures, "seconds": seconds}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
