"""Run a command as several JAX processes on this machine: ziggurat launch local --processes=2 -- pretrain --config=tiny

Every line that a process prints has its number before it. A signal goes on to all; when one fails, the others end too.
A run that has failed or was stopped is started again, by its exit status: see `supervise`.
"""

import argparse
import ctypes
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data.errors import InputError
from data.files.remote import protocol
from launch.presets import load_config
from train.run.name import CONFIG_FILE, read_config

# Seconds that processes have before they are killed: when one has failed, and to save when they are asked to end.
GRACE, PATIENCE = 3.0, 600.0
DONE, USERS_ERROR, PREEMPTED = 0, 2, 75
LONGEST_PAUSE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat launch local`."""
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--devices", type=int, metavar="K", help="virtual CPU devices of each [what JAX finds]")
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N",
        help="how often in a row a run that saves nothing new is started again [3]; 0: never",
    )  # fmt: skip
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="a command of ziggurat with its flags, after --")


def run(arguments: argparse.Namespace) -> int:
    """Start the processes and wait; returns the first status that is not 0."""
    problems = []
    if arguments.processes < 1:
        problems.append(f"--processes={arguments.processes} must be at least 1")
    if arguments.devices is not None and arguments.devices < 1:
        problems.append(f"--devices={arguments.devices} must be at least 1")
    if not arguments.command:
        problems.append("there is no command; give one after --, as in: -- pretrain --config=tiny")
    if arguments.restarts < 0:
        problems.append(f"--restarts={arguments.restarts} must be at least 0")
    if problems:
        raise InputError("\n".join(problems))
    environment = dict(os.environ)
    if arguments.devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
        environment["XLA_FLAGS"] = flags.strip()
    command = [sys.executable, "-m", "launch.cli", *arguments.command]
    own = [own_environment(environment, i, arguments.processes) for i in range(arguments.processes)]

    def start() -> Ended:
        coordinator = {"ZIGGURAT_COORDINATOR": f"127.0.0.1:{free_port()}"}
        return launch(command, [environment | coordinator for environment in own])

    folder = run_folder(arguments.command) if arguments.restarts else None
    return supervise(start, folder, arguments.restarts) if folder else start().status


def own_environment(environment: Mapping[str, str], process: int, processes: int) -> dict[str, str]:
    """Of one of so many processes: which it is, and its share of the machine's GPUs."""
    from train.devices.processes import share_of_gpus

    gpus = share_of_gpus(environment, process, processes)
    return {
        **environment,
        "ZIGGURAT_NUM_PROCESSES": str(processes),
        "ZIGGURAT_PROCESS_ID": str(process),
        **({"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, gpus))} if gpus else {}),
    }


def run_folder(command: Sequence[str]) -> Path | None:
    """Of the run that a command trains; none: it trains none. InputError where its config is wrong."""
    if command[0] != "pretrain" or {"-h", "--help"} & set(command):
        return None
    from launch.commands import parse

    _, arguments = parse(command)
    return Path(load_config(arguments.config, arguments.overrides).train.run_dir).expanduser()


class Ended(NamedTuple):
    """How processes ended: the first `status` that is not 0 (of a signal n: 128 + n), and whether they were `asked`."""

    status: int
    asked: bool


def supervise(
    start: Callable[[], Ended], folder: Path, restarts: int, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Start a run until it is done, as its exit statuses say.

    0 is done and 2 the user's error: it ends. 75 is stopped: start at once. All else is a fault: start after a pause
    that doubles, and give up after so many in a row that have saved nothing new. A signal to this process ends it, too.

    Args:
        start: runs all processes.
        folder: of the run.
        restarts: without progress.
        sleep: in seconds.
    """
    in_vain, reached = 0, last_saved(folder)
    while True:
        ended = start()
        if ended.asked or ended.status in (DONE, USERS_ERROR):
            return ended.status
        before, reached = reached, last_saved(folder)
        in_vain = 0 if reached > before else in_vain + (ended.status != PREEMPTED)
        if in_vain > restarts:
            say(f"status {ended.status}, and nothing new saved in {in_vain} starts: given up")
            return ended.status
        pause = 0.0 if ended.status == PREEMPTED else min(2.0**in_vain, LONGEST_PAUSE)
        say(
            f"status {ended.status}, saved up to step {reached}: starting again"
            + (f" in {pause:.0f} s" if pause else "")
        )
        sleep(pause)


def last_saved(folder: Path) -> int:
    """The step of a run's newest checkpoint, 0 where there is none; without JAX, which does not bear to be forked.

    Nor do the threads of a bucket's library: of checkpoints there it is the newest that was on its way.
    """
    place = read_config(folder).checkpoint.dir if (folder / CONFIG_FILE).exists() else None
    if place and protocol(place):
        events = folder / "events.jsonl"
        saves = re.findall(r'"event": "save", "step": (\d+)', events.read_text() if events.exists() else "")
        return int(saves[-1]) if saves else 0
    names = [path.name for path in Path(place or folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"ziggurat: {text}", file=sys.stderr, flush=True)


def launch(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Ended:
    """Run the command once in each environment, and wait until all have ended."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    processes: list[subprocess.Popen] = []
    threads: list[threading.Thread] = []
    status, asked, deadline = 0, False, math.inf
    try:
        for environment in environments:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            processes.append(process)
        # Threads come after all forks: a fork beside a thread may hang.
        for i, process in enumerate(processes):
            for pipe, out in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)):
                assert pipe is not None
                threads.append(threading.Thread(target=prefix_lines, args=(pipe, out, f"[{i}] "), daemon=True))
                threads[-1].start()
        while None in [process.poll() for process in processes]:
            for number in received:
                signal_all(processes, number)
                if not asked:
                    asked, deadline = True, min(deadline, time.monotonic() + PATIENCE)
            received.clear()
            failed = [process.returncode for process in processes if process.returncode]
            if failed and not status:
                status = failed[0]
                # What has stopped by itself has told the others to: they are about to end, too.
                stops = status == PREEMPTED
                deadline = min(deadline, time.monotonic() + (PATIENCE if stops else GRACE))
                if not asked and not stops:
                    signal_all(processes, signal.SIGTERM)
            if time.monotonic() > deadline:
                signal_all(processes, signal.SIGKILL)
            time.sleep(0.05)
        status = status or next((process.returncode for process in processes if process.returncode), 0)
    finally:
        signal_all(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for thread in threads:
            thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    return Ended(status if status >= 0 else 128 - status, asked)


def signal_all(processes: Sequence[subprocess.Popen], number: int) -> None:
    """To every process that still runs, and to what it started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


def prefix_lines(pipe: BinaryIO, out: BinaryIO, prefix: str) -> None:
    """Copy lines as they come. Where they can't be written (`| head`), the rest is taken all the same and dropped."""
    for line in pipe:
        try:
            out.write(prefix.encode() + line.rstrip(b"\r\n") + b"\n")
            out.flush()
        except OSError:
            # With nobody to empty its pipe the process would wait for ever.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), out.fileno())


def die_with_parent() -> Any:
    """In the child, before it becomes the command: end when the launcher does, however that ends (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
