"""Small wrong changes, planted one at a time: how many of them do the tests notice?

    python -m tests.benchmarks.mutations                 # all of mutations.toml: about ten minutes on two cores
    python -m tests.benchmarks.mutations stream loss     # those whose file or meaning has one of these words
    python -m tests.benchmarks.mutations --workers=1 run # one at a time, on a machine that has other work

Each change replaces one text, which stands once in its file, in a copy of the checkout, and the tests that its entry
names are run there until the first fails. A change is killed when a test fails, cannot be imported or runs out of time;
it lives when all pass. The same tests must pass without it. The last line is one JSON object; the status is 1 where
fewer than nine of ten were killed, or where an entry no longer fits the code.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_suffix(".toml")
SECONDS, AIM = 900, 0.9


@dataclass(frozen=True)
class Mutation:
    """One wrong change: the text `before` of `file` becomes `after`; `tests` are paths and node ids of pytest."""

    file: str
    before: str
    after: str
    tests: list[str]
    meaning: str

    def problem(self) -> str | None:
        """Returns why this entry cannot be planted; None where it can."""
        for test in self.tests:
            file, _, name = test.partition("::")
            if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text()):
                return f"there is no {test}"
        count = (ROOT / self.file).read_text().count(self.before) if (ROOT / self.file).is_file() else 0
        return None if count == 1 else f"its text stands {count} times in {self.file}"


def read_table(words: Sequence[str] = ()) -> list[Mutation]:
    """Returns the entries of the table whose file or meaning has one of the words; all of them where there are none."""
    entries = [Mutation(**entry) for entry in tomllib.loads(TABLE.read_text())["mutation"]]
    return [m for m in entries if not words or any(word in m.file + m.meaning for word in words)]


def copy_checkout(folder: Path) -> None:
    """Copies the files that git knows into a folder."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in filter(lambda name: (ROOT / name).is_file(), listing.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # The programs that the suite has compiled.
    (ROOT / ".pytest_cache").mkdir(exist_ok=True)
    (folder / ".pytest_cache").symlink_to(ROOT / ".pytest_cache")


def failure(folder: Path, tests: list[str], seconds: float | None = None) -> str | None:
    """Runs tests in a copy until the first fails or time is up; returns what they print last, or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with tempfile.TemporaryFile() as output:
        tests_run = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            status = tests_run.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"out of time after {seconds} s"
        finally:
            # What the tests have started ends with them.
            with suppress(ProcessLookupError):
                os.killpg(tests_run.pid, signal.SIGKILL)
            tests_run.wait()
        output.seek(0)
        printed = output.read().decode()[-2000:]
    if status > 2:
        raise RuntimeError(f"pytest ended with {status}:\n{printed}")
    return printed if status else None


def is_killed(mutation: Mutation) -> bool:
    """Plants a change in a copy of its own. True if the tests notice."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_checkout(folder)
        file = folder / mutation.file
        file.write_text(file.read_text().replace(mutation.before, mutation.after))
        return failure(folder, mutation.tests, SECONDS) is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", help="plants what has one of them in its file or meaning; all without any")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="changes that are tried at once")
    arguments = parser.parse_args()
    mutations = read_table(arguments.words)
    problems = [f"{m.file} ({m.meaning}): {problem}" for m in mutations if (problem := m.problem())]
    if problems or not mutations:
        print("\n".join(problems) or "no entry has these words")
        return 1
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        copy_checkout(Path(name))
        if printed := failure(Path(name), sorted({test for m in mutations for test in m.tests})):
            print(f"{printed}\nthe tests fail without any change")
            return 1
    killed = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for number, (mutation, is_dead) in enumerate(zip(mutations, pool.map(is_killed, mutations), strict=True), 1):
            killed += is_dead
            verdict = "killed" if is_dead else "LIVES"
            print(f"{number:3}  {verdict:6}  {mutation.file:40}  {mutation.meaning}", flush=True)
    share = killed / len(mutations)
    seconds = round(time.monotonic() - begun)
    print(json.dumps({"killed": killed, "planted": len(mutations), "share": round(share, 3), "seconds": seconds}))
    return int(share < AIM)


if __name__ == "__main__":
    sys.exit(main())
