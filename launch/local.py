"""Run a command as several JAX processes on this machine: ziggurat launch local --processes=2 -- pretrain --config=tiny

Every line that a process prints has its number before it. A signal goes on to all; when one fails, the others end too.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from data.errors import InputError

# Seconds that processes have to end by themselves before they are killed.
GRACE = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat launch local`."""
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many")
    parser.add_argument("--devices", type=int, metavar="K", help="virtual CPU devices of each [what JAX finds]")
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
    if problems:
        raise InputError("\n".join(problems))
    environment = dict(os.environ)
    if arguments.devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
        environment["XLA_FLAGS"] = flags.strip()
    environment |= {
        "ZIGGURAT_COORDINATOR": f"127.0.0.1:{free_port()}",
        "ZIGGURAT_NUM_PROCESSES": str(arguments.processes),
    }
    command = [sys.executable, "-m", "launch.cli", *arguments.command]
    return launch(command, [environment | {"ZIGGURAT_PROCESS_ID": str(i)} for i in range(arguments.processes)])


def launch(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Run the command once in each environment; returns the first status that is not 0 (of a signal n, 128 + n)."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    processes: list[subprocess.Popen] = []
    threads: list[threading.Thread] = []
    status, ending = 0, None
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
                ending = ending or time.monotonic()
            received.clear()
            failed = [process.returncode for process in processes if process.returncode]
            if failed and not status:
                status = failed[0]
                if ending is None:
                    ending = time.monotonic()
                    signal_all(processes, signal.SIGTERM)
            if ending and time.monotonic() > ending + GRACE:
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
    return status if status >= 0 else 128 - status


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
