"""A newcomer's first run: `make pretrain` in a fresh clone, of this commit and of the previous release.

    python -m tests.benchmarks.first_run [--previous=COMMIT] [--args=--config.train.num_steps=20]

Each side has a clone, a .venv and a home of its own in a temporary folder, so it begins with empty caches; only pip's
downloads are those of this user. The first installation here therefore downloads what is missing there. The previous
release runs first. Times are seconds since `make pretrain` was called: until everything is installed, the tokenizer
is written, the first step is finished, the first sample is in metrics.jsonl, and the end. The peak memory is that of
the training process. The last line is one JSON object; its ratios are the previous release's figures by this commit's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.doctor import processor

ROOT = Path(__file__).resolve().parent.parent.parent
# Variables of this process that a newcomer does not have.
OURS = ("JAX_", "XLA_", "PYTHON", "VIRTUAL_ENV", "GLIBC_TUNABLES", "XDG_", "MAKE")
ROWS = {
    "setup": "installed",
    "tokenizer": "tokenizer written",
    "first_step": "first step",
    "first_sample": "first sample",
    "end": "end",
}
INTERVAL = 0.1


def git(*words: str) -> str:
    """Returns what a git command prints in this checkout."""
    return subprocess.run(["git", "-C", ROOT, *words], check=True, capture_output=True, text=True).stdout.strip()


def previous_release() -> str:
    """Returns the last commit with another version in pyproject.toml than HEAD has."""
    return git("rev-parse", git("log", "-1", "--format=%H", "-G^version = ", "--", "pyproject.toml") + "^")


def environment(home: Path) -> dict[str, str]:
    """Returns the variables of a newcomer whose home is `home`, with this user's downloads of pip."""
    downloads = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], capture_output=True, text=True).stdout
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return kept | {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "PIP_CACHE_DIR": downloads.strip()}


def records_of(clone: Path) -> list[dict[str, Any]]:
    """Returns the complete lines of the metrics.jsonl of a clone's run; none before there is one."""
    files = [*clone.glob("runs/*/metrics.jsonl")]
    lines = files[0].read_text().splitlines(keepends=True) if files else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def first_run(commit: str, args: str) -> dict[str, Any]:
    """Clones a commit, runs `make pretrain` there, and returns its figures. SystemExit with its output if it fails."""
    with tempfile.TemporaryDirectory(prefix="first_run_") as folder:
        clone, home, output = (Path(folder, name) for name in ("ziggurat", "home", "output"))
        home.mkdir()
        git("clone", "--quiet", "--no-checkout", str(ROOT), str(clone))
        git("-C", str(clone), "checkout", "--quiet", "--detach", commit)
        command = ["make", "pretrain", f"PYTHON={sys.executable}", f"ARGS={args}"]
        variables = environment(home)
        begun, first_sample = time.time(), 0.0
        with output.open("wb") as file:
            process = subprocess.Popen(command, cwd=clone, env=variables, stdout=file, stderr=file)
            while process.poll() is None:
                time.sleep(INTERVAL)
                if not first_sample and any("sample" in record for record in records_of(clone)):
                    first_sample = time.time()
        ended = time.time()
        if process.returncode:
            sys.exit(f"make pretrain failed in {commit}:\n{output.read_text(errors='replace')[-4000:]}")
        records = records_of(clone)
        (tokenizer,) = clone.glob("runs/*/tokenizer/tokenizer.model")
        moments = {
            "setup": (clone / ".venv" / "base").stat().st_mtime,
            "tokenizer": tokenizer.stat().st_mtime,
            "first_step": records[0]["time"],
            "first_sample": first_sample or ended,
            "end": ended,
        }
    return {
        "commit": commit[:12],
        **{name: round(moment - begun, 1) for name, moment in moments.items()},
        "bits_a_byte": [
            [round(record["time"] - begun, 1), record["step"], round(record["validation_bits_per_byte"], 4)]
            for record in records
            if "validation_bits_per_byte" in record
        ],
        "peak_memory_bytes": max(record["memory_bytes"] for record in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--previous", metavar="COMMIT", help="[the last commit of the version before HEAD's]")
    parser.add_argument("--args", default="", help="ARGS of make, for a short trial [none]")
    arguments = parser.parse_args()
    commits = {"previous": arguments.previous or previous_release(), "present": "HEAD"}
    sides = {}
    for side, commit in commits.items():
        sides[side] = first_run(git("rev-parse", commit), arguments.args)
        print(f"{side}: {sides[side]['commit']} has ended after {sides[side]['end']:.0f} s", file=sys.stderr)

    previous, present = sides["previous"], sides["present"]
    ratios = {name: round(previous[name] / present[name], 2) for name in (*ROWS, "peak_memory_bytes")}
    print(f"{processor()}\n\n{'seconds until':20}{'previous':>10}{'present':>10}{'ratio':>8}")
    for name, title in ROWS.items():
        print(f"{title:20}{previous[name]:10.1f}{present[name]:10.1f}{ratios[name]:8.2f}")
    gib = [f"{side['peak_memory_bytes'] / 2**30:10.2f}" for side in (previous, present)]
    print(f"{'peak memory, GiB':20}{gib[0]}{gib[1]}{ratios['peak_memory_bytes']:8.2f}")
    for name, side in sides.items():
        print(f"\nbits a byte, {name}")
        for seconds, step, bits in side["bits_a_byte"]:
            print(f"  step {step:5}  {seconds:7.1f} s  {bits:.3f}")
    print(json.dumps({"processor": processor(), "args": arguments.args, **sides, "ratios": ratios}))


if __name__ == "__main__":
    main()
