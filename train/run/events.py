"""The audit log: one line of events.jsonl for everything that happens to a run apart from its steps, over all restarts.

Process 0 writes; each line is on disk before the run continues. A hook, any shell command, gets each line, too.
"""

import datetime
import hashlib
import json
import logging
import os
import platform
import socket
import subprocess
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from data.printable import without_credentials
from train.config.config import Config, to_json
from train.run.goodput import TimeAccount
from train.run.storage import storage_errors

log = logging.getLogger("ziggurat")
PACKAGES = ("ziggurat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")
# Seconds that the process waits for the hook as it ends.
HOOK_PATIENCE = 10.0


class Events:
    """The audit log of one run, open for one process; all but the first have no path, and write nothing.

    The hook, a shell command, gets each event as one line of JSON on its standard input. The run neither waits for it
    nor fails with it.
    """

    def __init__(self, path: Path | None, hook: str | None = None):
        self.account = TimeAccount()  # of this start; each event has it as `seconds`
        self._path = path
        self._hook = hook
        self._hooks: list[subprocess.Popen] = []

    def write(self, event: str, **fields: Any) -> None:
        """Writes one event, with the time in UTC."""
        self._write({"event": event} | fields | {"seconds": self.account.seconds()})

    def _write(self, fields: dict[str, Any]) -> None:
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = without_credentials(json.dumps({"time": now} | fields))
        with storage_errors("an event", self._path), self._path.open("a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            # A kill may have torn the last line.
            is_torn = file.read(1) not in (b"", b"\n")
            file.write(("\n" * is_torn + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if self._hook:
            self._call(line)

    def _call(self, line: str) -> None:
        """Starts the hook. Its input is a file, so it may read whenever it likes."""
        self._hooks = [hook for hook in self._hooks if self._is_running(hook)]
        try:
            with tempfile.TemporaryFile("w+") as file:
                file.write(line + "\n")
                file.seek(0)
                self._hooks.append(subprocess.Popen(self._hook or "", shell=True, stdin=file, start_new_session=True))
        except OSError as error:
            log.warning("train.on_event cannot be started: %s", error)

    def _is_running(self, hook: subprocess.Popen) -> bool:
        if status := hook.poll():
            log.warning("train.on_event ended with status %d", status)
        return hook.returncode is None

    def note_crash(self, alive_until: float | None) -> None:
        """Writes a `crash` event if the previous start ended without an event of its own (see `Lease.last_beat`)."""
        events = read_events(self._path) if self._path else []
        if events and (last := events[-1])["event"] not in ("stop", "end", "fault", "crash"):
            written = datetime.datetime.fromisoformat(last["time"]).timestamp()
            until = max(alive_until or written, written)
            self._write({"event": "crash", "step": last["step"], "alive_until": until})

    def close(self) -> None:
        """Waits a while for hooks that still run."""
        for hook in self._hooks:
            with suppress(subprocess.TimeoutExpired):
                hook.wait(HOOK_PATIENCE)
            if self._is_running(hook):
                log.warning("train.on_event still runs after %.0f s; it may continue", HOOK_PATIENCE)
        self._hooks.clear()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns all complete lines; none if there is no file."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # A kill may have torn the line.
            events.append(json.loads(line))
    return events


def start_fields(config: Config, data: str) -> dict[str, Any]:
    """Returns the fields of a `start` event about machine, code and config; `data` is the data's fingerprint."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": jax.process_count(),
        "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "mesh": {axis: size for axis, size in jax.sharding.get_mesh().shape.items() if size > 1},
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "config": hashlib.sha256(to_json(config).encode()).hexdigest(),
        "data": data,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Returns the commit of this code's checkout, with + if files differ; None without a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return commit.stdout.strip() + ("+" if changes.stdout else "") if commit.returncode == 0 else None
