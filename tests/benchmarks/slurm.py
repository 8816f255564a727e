"""Runs on a real Slurm of two nodes on this machine, with what happens to them there: python -m tests.benchmarks.slurm

Four runs of the same 2,000 steps on two nodes: one undisturbed; one in jobs of two minutes, which hits the limit twice
and is given more time then, so that it ends on a slow machine too; one whose second node dies; one of whose processes
is killed. Each must complete without help, its metrics have each step once and in order, and its weights be those of
the undisturbed one, bit for bit. Slurm must be installed (slurm-wlm, slurm-wlm-plugins, munge). A table, and the same
as one line of JSON; status 1 where anything differs. Six to twenty-five minutes on two cores.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch.slurm_cluster import NODES, Slurm, slurm_cluster
from tests.launch.small_run import ROOT, metrics, write_config

STEPS, EVERY = 2000, 100
FLAGS = (
    f"--config.train.num_steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}",
    "--config.train.log_every_steps=100", "--config.evaluation.every_steps=500", "--config.evaluation.sample_tokens=0",
)  # fmt: skip
COLUMNS = ("seconds", "starts", "requeues", "notices", "faults", "weights")


def undisturbed(slurm: Slurm, job: str, run: Path) -> None:
    """Nothing happens."""


def limit_is_hit(slurm: Slurm, job: str, run: Path) -> None:
    """Twice the job goes back to the queue because its time is up."""
    slurm.wait(lambda: int(slurm.job(job)["Restarts"]) == 2 or slurm.job(job)["JobState"] == "COMPLETED", 600,
               "the job is not requeued")  # fmt: skip
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def node_dies(slurm: Slurm, job: str, run: Path) -> None:
    """The second node is gone without a word; it comes back once Slurm has noticed."""
    slurm.wait(lambda: saved(run), 300, "nothing is saved")
    slurm.kill_node(NODES[1])
    state = ("sinfo", "--noheader", "--nodes", NODES[1], "--format=%T")
    slurm.wait(lambda: slurm.run(*state).startswith("down"), 120, "Slurm does not notice")
    slurm.start_node(NODES[1])


def process_dies(slurm: Slurm, job: str, run: Path) -> None:
    """`kill -9` of the second process."""
    slurm.wait(lambda: saved(run), 300, "nothing is saved")
    for pid in slurm.processes("SLURM_PROCID=1"):
        if b"launch.cli" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)


CASES: dict[str, tuple[tuple[str, ...], Callable[[Slurm, str, Path], None]]] = {
    "undisturbed": (("--time=60",), undisturbed),
    "time limit": (("--time=2", "--sbatch=--signal=TERM@45"), limit_is_hit),
    "node dies": (("--time=60",), node_dies),
    "process dies": (("--time=60",), process_dies),
}


def saved(run: Path) -> bool:
    """Whether a checkpoint is complete."""
    return any(path.name.isdigit() for path in (run / "checkpoints").glob("*"))


def run_case(slurm: Slurm, folder: Path, name: str) -> dict:
    """Submit a run, let happen what is to happen, and wait until its job is over."""
    flags, happens = CASES[name]
    run = folder / name.replace(" ", "_")
    began = time.monotonic()
    command = ("launch", "slurm", "--nodes=2", *flags, "--submit", "--", "pretrain",
               f"--config={write_config(folder, run.name)}", *FLAGS)  # fmt: skip
    job = subprocess.run([sys.executable, "-m", "launch.cli", *command], env=slurm.environment, cwd=folder,
                         stdout=subprocess.PIPE, text=True, check=True).stdout.strip()  # fmt: skip
    print(f"{name}: job {job} of\n  ziggurat {shlex.join(command)}", file=sys.stderr, flush=True)
    happens(slurm, job, run)
    over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    slurm.wait(lambda: slurm.job(job)["JobState"] in over, 1800, "the job does not end")
    seconds = time.monotonic() - began
    log = (folder / f"{run.name}-{job}.log").read_text()
    told = [line for line in log.splitlines() if "ziggurat:" in line or "resumes at" in line or "is finished" in line
            or "srun" in line or "slurmstepd" in line]  # fmt: skip
    print("\n".join(f"  | {line}" for line in told), file=sys.stderr, flush=True)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    count = lambda kind: len([event for event in events if event["event"] == kind])
    return {
        "state": slurm.job(job)["JobState"],
        "seconds": round(seconds),
        "starts": count("start"),
        "requeues": int(slurm.job(job)["Restarts"]),
        "notices": count("stop"),
        "faults": count("fault") + count("crash"),
        "in_order": [record["step"] for record in metrics(run)] == [*range(1, STEPS + 1)],
        "weights": hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()[:12],
        "left": len(slurm.processes(f"SLURM_JOB_ID={job}")),
    }


def problems(results: dict[str, dict]) -> list[str]:
    """What is not as it should be."""
    found = []
    for name, result in results.items():
        wrong = {
            "it did not complete": result["state"] != "COMPLETED",
            "a step is missing, twice or out of order": not result["in_order"],
            "other weights": result["weights"] != results["undisturbed"]["weights"],
            "something is left running": result["left"],
            "nothing happened to it": name != "undisturbed" and result["starts"] == 1,
            "it was not requeued": name in ("time limit", "node dies") and not result["requeues"],
        }
        found += [f"{name}: {what}" for what, is_so in wrong.items() if is_so]
    return found


def main() -> int:
    """Run all cases; returns the exit status."""
    os.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    results = {}
    with tempfile.TemporaryDirectory() as folder, slurm_cluster() as slurm:
        for name in CASES:
            results[name] = run_case(slurm, Path(folder), name)
    print(f"{'':14}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name, result in results.items():
        print(f"{name:14}" + "".join(f"{result[column]:>14}" for column in COLUMNS))
    found = problems(results)
    for line in found:
        print(line)
    print(json.dumps({"benchmark": "slurm", "problems": found, "cases": results}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
