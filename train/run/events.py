"""The audit log: one line of events.jsonl for whatever happened to a run beside its steps, over all restarts.

Process 0 writes; each line is on disk before the run goes on. A hook, any shell command, gets each line, too.
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

from train.config.config import Config, to_json
from train.run.goodput import TimeAccount
from train.run.storage import storage_errors

log = logging.getLogger("ziggurat")
PACKAGES = ("ziggurat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")
# Seconds that the hook may still take when the process ends.
HOOK_PATIENCE = 10.0


class Events:
    """The log of one run, open for one process of it.

    Attributes:
        account: where the time of this start has gone; each event has it as `seconds`.

    Args:
        path: of the file; none: nothing is written (all processes but the first).
        hook: a shell command that gets each event as one line of JSON on its standard input; its own output is the
            run's. The run does not wait for it, and does not fail with it.
    """

    def __init__(self, path: Path | None, hook: str | None = None):
        self.account = TimeAccount()
        self._path, self._hook = path, hook
        self._hooks: list[subprocess.Popen] = []

    def write(self, event: str, **fields: Any) -> None:
        """One event, with the time in UTC."""
        self._write({"event": event} | fields | {"seconds": self.account.seconds()})

    def _write(self, fields: dict[str, Any]) -> None:
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now} | fields)
        with storage_errors("an event", self._path), self._path.open("a+b") as file:
            file.seek(max(file.tell() - 1, 0))
            torn = file.read(1) not in (b"", b"\n")  # by a kill
            file.write(("\n" * torn + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if self._hook:
            self._call(line)

    def _call(self, line: str) -> None:
        """Start the hook. It may read when it likes: what it gets is in a file."""
        self._hooks = [hook for hook in self._hooks if self._runs(hook)]
        try:
            with tempfile.TemporaryFile("w+") as file:
                file.write(line + "\n")
                file.seek(0)
                self._hooks.append(subprocess.Popen(self._hook or "", shell=True, stdin=file, start_new_session=True))
        except OSError as error:
            log.warning("train.on_event cannot be started: %s", error)

    def _runs(self, hook: subprocess.Popen) -> bool:
        if status := hook.poll():
            log.warning("train.on_event ended with status %d", status)
        return hook.returncode is None

    def note_crash(self, alive_until: float | None) -> None:
        """Write down that the start before has ended without a word, where it has.

        Args:
            alive_until: when it last showed that it lived (seconds since 1970); none: it has let go of its lease.
        """
        before = read_events(self._path) if self._path else []
        if before and before[-1]["event"] not in ("stop", "end", "fault", "crash"):
            last = datetime.datetime.fromisoformat(before[-1]["time"]).timestamp()
            until = max(alive_until or last, last)
            self._write({"event": "crash", "step": before[-1]["step"], "alive_until": until})

    def close(self) -> None:
        """Wait for hooks that still run, for a while."""
        for hook in self._hooks:
            with suppress(subprocess.TimeoutExpired):
                hook.wait(HOOK_PATIENCE)
            if self._runs(hook):
                log.warning("train.on_event still runs after %.0f s; it is left alone", HOOK_PATIENCE)
        self._hooks.clear()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete lines; none where there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # A line that a kill has torn.
    return found


def start_fields(config: Config, data: str) -> dict[str, Any]:
    """What a start says of where and what it is.

    Args:
        data: the fingerprint of the data.
    """
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
    """Of the checkout that this code runs from, with + where files differ from it; none: it is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return commit.stdout.strip() + ("+" if changes.stdout else "") if commit.returncode == 0 else None
