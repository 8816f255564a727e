"""Run a command as several JAX processes on this machine: ziggurat launch local --processes=2 -- pretrain --config=tiny

Each line that a process prints is prefixed with its number. Signals are passed on to all processes; when one fails, the
others are ended. A run that has failed or was stopped is started again, depending on its exit status.
"""

import argparse
import ctypes
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import BinaryIO, NamedTuple

from data.errors import InputError
from data.files.remote import protocol
from launch.arguments import too_small
from launch.commands import parse
from launch.presets import load_config
from train.devices.processes import share_of_gpus
from train.run.run_name import CONFIG_FILE, read_config

DONE, USERS_ERROR, PREEMPTED = 0, 2, 75
# Seconds until processes are killed: after another has failed, and after they were asked to end, so that they can save.
SECONDS_AFTER_FAILURE = 3.0
SECONDS_TO_SAVE = 600.0
MAX_PAUSE = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat launch local`."""
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument("--devices", type=int, metavar="K", help="virtual CPU devices of each [what JAX finds]")
    help = "how often in a row a run that saves nothing new is started again [3]; 0: never"
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help=help)
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="a command of ziggurat with its flags, after --")


def run(arguments: argparse.Namespace) -> int:
    """Runs the processes until they end; returns the first exit status that is not 0."""
    problems = too_small(arguments, {"processes": 1, "devices": 1, "restarts": 0})
    if not arguments.command:
        problems.append("there is no command; give one after --, as in: -- pretrain --config=tiny")
    if problems:
        raise InputError("\n".join(problems))
    shared = dict(os.environ)
    if arguments.devices:
        count = f"--xla_force_host_platform_device_count={arguments.devices}"
        shared["XLA_FLAGS"] = f"{shared.get('XLA_FLAGS', '')} {count}".strip()
    # -P: the folder where this is started is no place to import from.
    command = [sys.executable, "-P", "-m", "launch.cli", *arguments.command]
    environments = [process_environment(shared, i, arguments.processes) for i in range(arguments.processes)]

    def start() -> Exit:
        coordinator = {"ZIGGURAT_COORDINATOR": f"127.0.0.1:{free_port()}"}
        return run_processes(command, [environment | coordinator for environment in environments])

    folder = run_folder(arguments.command) if arguments.restarts else None
    return supervise(start, folder, arguments.restarts) if folder else start().status


def process_environment(environment: Mapping[str, str], process: int, processes: int) -> dict[str, str]:
    """Returns the environment of one process: its number, and its share of the machine's GPUs."""
    own = {"ZIGGURAT_NUM_PROCESSES": str(processes), "ZIGGURAT_PROCESS_ID": str(process)}
    if gpus := share_of_gpus(environment, process, processes):
        own["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, gpus))
    return {**environment, **own}


def run_folder(command: Sequence[str]) -> Path | None:
    """Returns the folder of the run that a command trains, if any. Raises InputError where its config is wrong."""
    if command[0] != "pretrain" or {"-h", "--help"} & set(command):
        return None
    _, arguments = parse(command)
    return Path(load_config(arguments.config, arguments.overrides).train.run_dir).expanduser()


class Exit(NamedTuple):
    """The first exit status that is not 0 (128 + n after signal n), and whether a signal asked the launcher to end."""

    status: int
    was_asked: bool


def supervise(
    start: Callable[[], Exit], folder: Path, restarts: int, sleep: Callable[[float], None] = time.sleep
) -> int:
    """Starts a run again and again until its exit status, or a signal to this process, ends it; returns the status.

    After 75 (stopped) it starts at once. A fault is followed by a pause that doubles; after more than `restarts` starts
    in a row that saved nothing new in the run's folder, it gives up.
    """

    def say(text: str) -> None:
        # A terminal that has closed must not end the run.
        with suppress(OSError):
            print("ziggurat:", text, file=sys.stderr, flush=True)

    in_vain, reached = 0, newest_step(folder)
    while True:
        end = start()
        if end.was_asked or end.status in (DONE, USERS_ERROR):
            return end.status
        before, reached = reached, newest_step(folder)
        in_vain = 0 if reached > before else in_vain + (end.status != PREEMPTED)
        if in_vain > restarts:
            say(f"status {end.status}, and nothing new saved in {in_vain} starts: given up")
            return end.status
        pause = 0.0 if end.status == PREEMPTED else min(2.0**in_vain, MAX_PAUSE)
        in_seconds = f" in {pause:.0f} s" if pause else ""
        say(f"status {end.status}, saved up to step {reached}: starting again{in_seconds}")
        sleep(pause)


def newest_step(folder: Path) -> int:
    """Returns the step of a run's newest checkpoint, or 0.

    `Checkpoints.steps` knows better, but needs JAX and, for a bucket, threads, neither of which may be there when a
    process forks. For a bucket this is the newest save in the audit log, which may be incomplete.
    """
    place = read_config(folder).checkpoint.dir if (folder / CONFIG_FILE).exists() else None
    if place and protocol(place):
        events = folder / "events.jsonl"
        saves = re.findall(
            r'"event": "save", "step": (\d+)', events.read_text(errors="replace") if events.is_file() else ""
        )
        return int(saves[-1]) if saves else 0
    checkpoints = Path(place or folder / "checkpoints")
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)), default=0)


def run_processes(command: Sequence[str], environments: Sequence[Mapping[str, str]], with_prefix: bool = True) -> Exit:
    """Runs the command once in each environment and waits until all have ended.

    Without the prefix of lines, standard error is this process's own, so a terminal stays one, and standard output is
    dropped.
    """
    received: list[int] = []
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in signals}
    processes: list[Popen] = []
    threads: list[threading.Thread] = []
    out, err = (PIPE, PIPE) if with_prefix else (DEVNULL, None)
    start = partial(Popen, stdin=DEVNULL, stdout=out, stderr=err, start_new_session=True, preexec_fn=die_with_parent)
    try:
        for environment in environments:
            processes.append(start(command, env=environment))
        # All forks come before the first thread: a fork of a process with threads may deadlock.
        for i, process in enumerate(processes):
            for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)) if with_prefix else ():
                assert pipe is not None
                arguments = (pipe, stream.buffer, f"[{i}] ")
                threads.append(threading.Thread(target=prefix_lines, args=arguments, daemon=True))
                threads[-1].start()
        return wait_for(processes, received)
    finally:
        signal_all(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for thread in threads:
            thread.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def wait_for(processes: Sequence[Popen], received: list[int]) -> Exit:
    """Waits until all processes have ended; passes on the signals in `received`, and ends all once one has failed."""
    status, was_asked, deadline = 0, False, math.inf
    while None in [process.poll() for process in processes]:
        for number in received:
            signal_all(processes, number)
            if not was_asked:
                was_asked = True
                deadline = min(deadline, time.monotonic() + SECONDS_TO_SAVE)
        received.clear()
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not status:
            status = failed[0]
            # A process that stops by itself does so together with all others, which are still saving.
            is_stopping = status == PREEMPTED
            deadline = min(deadline, time.monotonic() + (SECONDS_TO_SAVE if is_stopping else SECONDS_AFTER_FAILURE))
            if not was_asked and not is_stopping:
                signal_all(processes, signal.SIGTERM)
        if time.monotonic() > deadline:
            signal_all(processes, signal.SIGKILL)
        time.sleep(0.05)
    status = status or next((process.returncode for process in processes if process.returncode), 0)
    return Exit(status if status >= 0 else 128 - status, was_asked)


def signal_all(processes: Sequence[Popen], number: int) -> None:
    """Sends a signal to every process that still runs, and to the processes that it started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


def prefix_lines(pipe: BinaryIO, out: BinaryIO, prefix: str) -> None:
    """Copies lines as they come. Where they can't be written (`| head`), all later lines are read and dropped."""
    for line in pipe:
        try:
            out.write(prefix.encode() + line.rstrip(b"\r\n") + b"\n")
            out.flush()
        except OSError:
            # Reading continues: the process would block for ever on a full pipe.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), out.fileno())


def die_with_parent() -> None:
    """Runs in the child: asks Linux to kill it when the launcher ends, in whatever way that happens."""
    if sys.platform == "linux":
        # 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port() -> int:
    """Returns a TCP port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
