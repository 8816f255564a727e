"""Faults of every kind, at random instants, and what must be left of them at the end of a run: nothing.

`ziggurat launch local` keeps the run alive, as a scheduler would. What it cannot mend, a disk or an operator does here.
"""

import datetime
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.launch.small_run import ROOT, environment, write_config

# Fault → events, of which the run's audit log must have one. (Of a process that is killed the others say that they
# fail, or are ended before they can.)
ENDS = ("crash", "fault")
FAULTS = {
    "kill": ENDS,
    "kill in a save": ENDS,
    "kill all": ("crash",),
    "terminate": ("stop",),
    "full disk": ENDS,
    "truncated checkpoint": ("crash",),
    "flipped bit": ("crash",),
    "NaN once": ("rollback",),
    "NaN twice": ("skip",),
    "NaN in one process": ("rollback",),
}
# Two with one new start, for the test, whose time goes into starts.
TOGETHER = {"kill and truncated checkpoint": ENDS}
PATIENCE = 300.0
# In each process, as the interpreter starts: once train.loop is there, steps are poisoned as the file says.
POISON = """
import importlib.abc, importlib.util, json, math, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            patch(module)
        spec.loader.exec_module = exec_module
        return spec

def patch(module):
    import jax, numpy
    path = os.environ["CHAOS_POISON"]
    class Programs(module.StepPrograms):
        def __call__(self, step, state, batch):
            try:
                wanted = json.load(open(path))
            except FileNotFoundError:
                wanted = None
            if wanted and step >= wanted["from"]:
                mine = f"{path}.{wanted['number']}.{jax.process_index()}"
                done = json.load(open(mine)) if os.path.exists(mine) else []
                # The first step that it comes to, so many times.
                if len(done) < wanted["times"] and step == (done or [step])[0]:
                    json.dump([*done, step], open(mine, "w"))
                    if wanted["all"]:
                        state["weights"] = jax.tree.map(lambda x: x * math.nan, state["weights"])
                    elif jax.process_index() == jax.process_count() - 1:
                        state, metrics = super().__call__(step, state, batch)
                        return state, metrics | {"grad_norm": wrong(metrics["grad_norm"])}
            return super().__call__(step, state, batch)

    def wrong(x):
        copies = [jax.device_put(numpy.float32(math.nan), shard.device) for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, copies)

    module.StepPrograms = Programs

sys.meta_path.insert(0, Finder())
"""


class Chaos:
    """A small run in `folder`, and what happens to it.

    Args:
        folder: for everything; must be there.
        processes: how many the run has at each start that is not the launcher's own, again from the first when all
            were had; each has so many devices that there are `devices`.
        devices: of all processes; none: one each.
        steps: of the run.
        seed: of the instants.
    """

    def __init__(self, folder: Path, processes: Sequence[int], devices: int | None, steps: int, seed: int = 0):
        self.folder, self.run, self.chance = folder, folder / "run", random.Random(seed)
        self._counts, self._devices, self.steps = itertools.cycle(processes), devices, steps
        self._poisoned = 0
        self._launcher: subprocess.Popen | None = None
        hooks = folder / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(POISON)
        self._environment = environment() | {
            "PYTHONPATH": os.pathsep.join([str(hooks), str(ROOT)]),
            "CHAOS_POISON": str(folder / "poison"),
        }

    def command(self, run: str, processes: int, *flags: str) -> list[str]:
        """Of the launcher, for this run or one beside it."""
        fields = {"train.num_steps": self.steps, "checkpoint.every_steps": 10,
                  "data.num_streams": 4, "data.positions_every_steps": 7, "checkpoint.export": "false",
                  "data.validation_fraction": 0,
                  "recovery.max_skipped_batches": 10**6, "optimizer.learning_rate": 1e-3}  # fmt: skip
        return [
            sys.executable, "-m", "launch.cli", "launch", "local", f"--processes={processes}",
            f"--devices={(self._devices or processes) // processes}", "--",
            "pretrain", f"--config={write_config(self.folder, run)}", *(f"--config.{k}={v}" for k, v in fields.items()),
            *flags,
        ]  # fmt: skip

    def start(self) -> None:
        """With the next number of processes."""
        with (self.folder / "log").open("a") as log:
            self._launcher = subprocess.Popen(
                self.command("run", next(self._counts)), env=self._environment, stdout=log, stderr=log
            )

    def straight(self, processes: int) -> Path:
        """Undisturbed, to the end, leaving out what this run has left out."""
        entries = [json.loads(line) for line in lines(self.run / "recovery.jsonl")]
        skips = {str(batch): 1 for entry in entries for batch in entry.get("batches", [])}
        environment = self._environment | {"PYTHONPATH": str(ROOT)}
        command = self.command("straight", processes, f"--config.recovery.skips={json.dumps(skips)}")
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return self.folder / "straight"

    def suffer(self, fault: str) -> None:
        """One fault, some steps after the beginning of this start, and the start after it."""
        wanted = self.chance.randint(1, 25)
        self.wait(lambda: self.steps_of_this_start() >= wanted)
        events = (FAULTS | TOGETHER)[fault]
        starts, seen = self.count("start"), self.count(*events)
        time.sleep(self.chance.random() * 0.3)
        getattr(self, "_" + fault.replace(" ", "_"))()
        self.wait(lambda: self.count(*events) > seen)
        if not fault.startswith("NaN"):
            self.wait(lambda: self.count("start") > starts)

    def to_the_end(self) -> None:
        """Wait for the run's end; nothing is left running."""
        assert self._launcher
        status = self._launcher.wait(PATIENCE)
        assert status == 0, self.log()
        left = [pid for pid in os.listdir("/proc") if pid.isdigit() and str(self.folder).encode() in command_line(pid)]
        assert not left, left

    def _kill(self) -> None:
        os.kill(self.chance.choice(self.children()), signal.SIGKILL)

    def _kill_in_a_save(self) -> None:
        self.wait(lambda: any("tmp" in path.name for path in (self.run / "checkpoints").iterdir()))
        time.sleep(self.chance.random() * 0.02)
        self._kill()

    def _terminate(self) -> None:
        os.kill(self.chance.choice(self.children()), signal.SIGTERM)

    def _full_disk(self) -> None:
        """No process can make a file larger than it is likely to be."""
        for pid in self.children():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    def _kill_all(self) -> None:
        self.stop()
        self.start()

    def _truncated_checkpoint(self) -> None:
        self._stop_with_an_older_checkpoint()
        self._truncate()
        self.start()

    def _kill_and_truncated_checkpoint(self) -> None:
        """Both before the launcher starts the processes again, which it does after a pause."""
        self.wait(lambda: len(self._saved()) > 1)
        self._kill_in_a_save()
        self.wait(lambda: not self.children())
        self._truncate()

    def _truncate(self) -> None:
        # Often a file that only some of the processes read.
        file = max(self._array_files(), key=lambda path: path.stat().st_size)
        os.truncate(file, file.stat().st_size // 2)

    def _flipped_bit(self) -> None:
        self._stop_with_an_older_checkpoint()
        file = self.chance.choice(self._array_files())
        content = bytearray(file.read_bytes())
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        file.write_bytes(content)
        self.start()

    def _NaN_once(self) -> None:
        self._poison(1)

    def _NaN_twice(self) -> None:
        self._poison(2)

    def _NaN_in_one_process(self) -> None:
        self._poison(1, everywhere=False)

    def _poison(self, times: int, everywhere: bool = True) -> None:
        self._poisoned += 1
        made = self.folder / "poison.partial"
        made.write_text(
            json.dumps({"from": self.step() + 5, "times": times, "all": everywhere, "number": self._poisoned})
        )
        made.replace(self.folder / "poison")

    def _array_files(self) -> list[Path]:
        """Of the newest checkpoint: those with the bytes of arrays."""
        return [path for path in (self.run / "checkpoints" / str(max(self._saved()))).rglob("d/*") if path.is_file()]

    def _saved(self) -> list[int]:
        """Steps of the run's checkpoints."""
        return [int(path.name) for path in (self.run / "checkpoints").iterdir() if path.name.isdigit()]

    def _stop_with_an_older_checkpoint(self) -> None:
        """Where the only one is damaged, nothing but a person helps."""
        self.wait(lambda: len(self._saved()) > 1)
        self.stop()

    def stop(self) -> None:
        """Kill the launcher, and with it all."""
        assert self._launcher
        children = self.children()
        self._launcher.kill()
        self._launcher.wait()
        deadline = time.monotonic() + PATIENCE
        while any(command_line(str(pid)) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def children(self) -> list[int]:
        """The processes that train."""
        assert self._launcher
        pid = self._launcher.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def events(self) -> list[dict[str, Any]]:
        """Of the run, so far."""
        return [json.loads(line) for line in lines(self.run / "events.jsonl")]

    def count(self, *names: str) -> int:
        """How often one of these has happened."""
        return sum(event["event"] in names for event in self.events())

    def steps_of_this_start(self) -> int:
        """How many the newest start has done."""
        starts = [event for event in self.events() if event["event"] == "start"]
        path = self.run / "metrics.jsonl"
        if not starts or not path.exists():
            return 0
        begun = datetime.datetime.fromisoformat(starts[-1]["time"]).timestamp()
        # Before it has written, there are the steps of the start before.
        return self.step() - starts[-1]["step"] if path.stat().st_mtime > begun else 0

    def step(self) -> int:
        """That was done last."""
        done = lines(self.run / "metrics.jsonl")
        return int(json.loads(done[-1])["step"]) if done else 0

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds, while the launcher lives."""
        deadline = time.monotonic() + PATIENCE
        assert self._launcher
        while not condition():
            assert time.monotonic() < deadline, f"it did not come\n{self.log()}"
            assert self._launcher.poll() is None, f"the launcher has ended\n{self.log()}"
            time.sleep(0.02)

    def log(self) -> str:
        """The end of what the launcher and its processes have said."""
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-60:])


def lines(path: Path) -> list[str]:
    """The complete ones."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def by_step(path: Path) -> dict[int, dict[str, Any]]:
    """The records of a log. Each step stands there once, in order."""
    records = [json.loads(line) for line in lines(path)]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps))
    return dict(zip(steps, records, strict=True))


def same_curve(run: Path, straight: Path) -> float:
    """The largest relative difference of a step's loss; every step must be there once, and have seen the same data."""
    found, wanted = (by_step(folder / "metrics.jsonl") for folder in (run, straight))
    assert list(found) == list(wanted) == list(range(1, len(wanted) + 1))
    assert [record["loss_weight"] for record in found.values()] == [x["loss_weight"] for x in wanted.values()]
    places, expected = (by_step(folder / "positions.jsonl") for folder in (run, straight))
    # A run that resumes also logs where.
    assert expected.keys() <= places.keys()
    assert all(places[step] == record for step, record in expected.items())
    return max(abs(found[step]["loss"] / wanted[step]["loss"] - 1) for step in wanted)


def command_line(pid: str) -> bytes:
    """Of a process; nothing where it is no more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
