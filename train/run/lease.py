"""The lease: one run's processes at a time may write to a folder, and show that they are alive.

`lease.json` names them, with a counter that they increase as a heartbeat. It is created exclusively. Another start
takes it over once its holder is dead: at once if that can be seen, otherwise after several heartbeats are missing. No
clocks are compared.
"""

import hashlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files.atomic import atomic_file, create_file, hidden
from data.files.json_file import parse_json, read_small_file

log = logging.getLogger("ziggurat")
BEAT_SECONDS = 5.0
# Heartbeats that must be missing before a holder on another machine counts as dead.
MISSING_BEATS = 6


class Lease:
    """The right of process 0 of a run to write to a folder, until `release`."""

    def __init__(self, path: Path):
        self._path = path
        # The previous holder's last sign of life (seconds since 1970), or None if it released the lease.
        self.last_beat: float | None = None
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "system": pid_system(), "begun": time.time()}
        self._is_new = False  # whether the folder was made for the lease
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Takes the lease. Raises InputError if its holder is alive."""
        self._is_new = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        tries = 0
        while not create_file(self._path, self._entry(0)):
            with suppress(FileNotFoundError):  # It was released.
                before = read_small_file(self._path)
                self.last_beat = self._path.stat().st_mtime
                self._wait_for_death(before, sleep)
                if self._replace(before, is_last=tries == MISSING_BEATS):
                    break
                sleep(BEAT_SECONDS)
                tries += 1
        self._thread.start()

    def _replace(self, before: bytes, is_last: bool) -> bool:
        """Replaces a dead holder's lease; False if another start does, or has done so."""
        # Of all that saw this lease, one creates this file, and looks at the lease again.
        claim = hidden(self._path, hashlib.sha256(before).hexdigest()[:16], "new")
        if is_last:  # It was killed meanwhile.
            claim.unlink(missing_ok=True)
        try:
            claim.open("xb").close()
        except FileExistsError:
            return False
        try:
            is_unchanged = read_small_file(self._path) == before
            if is_unchanged:
                self._write(0)
            return is_unchanged
        finally:
            claim.unlink()

    def _wait_for_death(self, before: bytes, sleep: Callable[[float], None]) -> None:
        """Returns once the holder of a lease that holds these bytes is dead. InputError if it is alive."""
        holder = parse_lease(before)
        who, run = name_of(holder), self._path.parent
        if self._is_dead(holder):
            return
        log.info("%s may still write to %s; waiting %.0f s for a sign of life", who, run, MISSING_BEATS * BEAT_SECONDS)
        for _ in range(MISSING_BEATS):
            sleep(BEAT_SECONDS)
            if (now := read_small_file(self._path)) != before:
                who = name_of(parse_lease(now))
                raise InputError(
                    f"{run} is being written to by {who}; end that one, or start another run with "
                    "--config.train.run_dir=FOLDER"
                )

    def release(self) -> None:
        """Releases the lease, if it was taken, and removes a folder that was made for it if nothing else is there."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join()
        with suppress(OSError):  # The disk is gone. The next start sees that this process has ended.
            if self._is_ours(read_lease(self._path)):
                self._path.unlink()
            if self._is_new:
                self._path.parent.rmdir()

    def _is_dead(self, holder: dict[str, Any] | None) -> bool:
        """True for a holder whose process number this process can see, and whose process has ended."""
        if holder is None or any(holder.get(name) != self._holder[name] for name in ("host", "system")):
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return bool(holder["pid"] == os.getpid())

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            try:
                if (holder := read_lease(self._path)) and not self._is_ours(holder):
                    run = self._path.parent
                    print(
                        f"ziggurat: {name_of(holder)} has taken over {run}: ended at once", file=sys.stderr, flush=True
                    )
                    os._exit(1)
                self._write(beats)
            except OSError as error:
                # A full disk may have room again by the next beat.
                log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _write(self, beats: int) -> None:
        with atomic_file(self._path) as partial:
            partial.write_bytes(self._entry(beats))

    def _is_ours(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and {name: holder.get(name) for name in self._holder} == self._holder

    def _entry(self, beats: int) -> bytes:
        return (json.dumps(self._holder | {"beats": beats}) + "\n").encode()


def pid_system() -> str | None:
    """Returns what tells systems apart within which a process number is unique: the boot and the PID namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def read_lease(path: Path) -> dict[str, Any] | None:
    """Returns the holder's entry, or None if nobody holds the lease, or it is damaged."""
    with suppress(FileNotFoundError, InputError):
        return parse_lease(read_small_file(path))
    return None


def parse_lease(content: bytes) -> dict[str, Any] | None:
    """Returns the entry of a lease, or None if it is damaged."""
    with suppress(ValueError):
        entry = parse_json(content.decode())
        if isinstance(entry, dict) and isinstance(entry.get("host"), str) and type(entry.get("pid")) is int:
            return entry if 0 < entry["pid"] < 2**31 else None
    return None


def name_of(holder: dict[str, Any] | None) -> str:
    """Returns the name of a holder for messages."""
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"
