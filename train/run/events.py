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
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from data.files.json_file import parse_json
from data.printable import without_credentials
from train.config.config import Config, to_json
from train.run.goodput import TimeAccount
from train.run.json_lines import Record, is_count, is_moment, is_number, read_log
from train.run.storage import storage_errors

log = logging.getLogger("ziggurat")
PACKAGES = ("ziggurat", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")
# Seconds that the process waits for the hook as it ends.
HOOK_PATIENCE = 10.0
# Bytes at the end of the log within which a torn line is looked for.
LONGEST_TORN = 2**20
# The events that others rely on for their step and seconds.
TIMED = {"start", "save", "stop", "end"}


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
            end = file.tell()
            file.seek(max(end - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # A kill has torn the last line.
                file.seek(max(end - LONGEST_TORN, 0))
                _, begin, torn = file.read().rpartition(b"\n")
                try:
                    parse_json(torn.decode())
                    is_torn = False
                except ValueError:
                    is_torn = bool(begin) or len(torn) == end
                if is_torn:
                    file.truncate(end - len(torn))
                else:
                    line = f"\n{line}"
            file.write((line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if self._hook:
            self._call(line.lstrip())

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
            self._write({"event": "crash", "step": last.get("step", 0), "alive_until": until})

    def close(self) -> None:
        """Waits a while for hooks that still run."""
        for hook in self._hooks:
            with suppress(subprocess.TimeoutExpired):
                hook.wait(HOOK_PATIENCE)
            if self._is_running(hook):
                log.warning("train.on_event still runs after %.0f s; it may continue", HOOK_PATIENCE)
        self._hooks.clear()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Returns all events that are not damaged; none if there is no file."""
    return [event for _, event in read_log(path, _is_event)]


def _is_event(record: Record) -> bool:
    name, seconds = record.get("event"), record.get("seconds", {})
    try:
        is_known = is_moment(datetime.datetime.fromisoformat(record["time"]).timestamp())
    except (KeyError, TypeError, ValueError, OverflowError):
        is_known = False
    return (
        is_known
        and isinstance(name, str)
        and (name not in TIMED or {"step", "seconds"} <= record.keys())
        and is_count(record.get("step", 0))
        and isinstance(seconds, dict)
        and all(map(is_moment, seconds.values()))
        and is_moment(record.get("alive_until", 0))
        and is_moment(record.get("stall_seconds", 0))
        and (name != "merge" or _has_origins(record))
    )


def _has_origins(record: Record) -> bool:
    """True if a `merge` names the checkpoints that were averaged, with their weights."""
    origins = record.get("of")
    return (
        isinstance(record.get("scheme"), str)
        and isinstance(origins, list)
        and all(isinstance(o, dict) and isinstance(o.get("run"), str) for o in origins)
        and all(is_count(o.get("step")) and is_number(o.get("weight")) for o in origins)
    )


def newest_saved_step(events: Iterable[Record]) -> int:
    """Returns the step of the newest checkpoint that was surely complete, or 0; a `save` says that one has begun."""
    saved = begun = 0
    for event in events:
        match event["event"]:
            case "start":
                # A start from step 0, or from another run, has begun the run again.
                saved, begun = 0 if "fork" in event else event["step"], 0
            case "save":
                # A save waits for the one before.
                saved, begun = begun or saved, event["step"]
            case "rollback" if event.get("to") == begun:
                saved = begun
            case "stop" | "end":
                saved = event["step"]
    return saved


def skipped_since_begin(events: Iterable[Record]) -> bool:
    """True if batches have been skipped since the run began from its first step."""
    has_skipped = False
    for event in events:
        if event["event"] == "start" and (event["step"] == 0 or "fork" in event):
            has_skipped = False
        has_skipped |= event["event"] == "rollback" and event.get("action") == "skip"
    return has_skipped


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
