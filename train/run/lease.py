"""The lease: one run's processes at a time may write to a folder, and show that they are alive.

`lease.json` names them, with a counter that they increase as a heartbeat. Another start takes it over once its holder
is dead: at once if that can be seen, otherwise after several heartbeats are missing. No clocks are compared.
"""

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
from data.files.atomic import atomic_file

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
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "begun": time.time()}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Takes the lease. Raises InputError if its holder is alive."""
        holder = read_lease(self._path)
        self.last_beat = self._path.stat().st_mtime if holder else None
        if holder and not self._is_dead(holder):
            who = f"process {holder['pid']} on {holder['host']}"
            log.info("%s may still write to %s; waiting %.0f s for a sign of life", who, self._path.parent,
                     MISSING_BEATS * BEAT_SECONDS)  # fmt: skip
            for _ in range(MISSING_BEATS):
                sleep(BEAT_SECONDS)
                if (now := read_lease(self._path)) and now != holder:
                    raise InputError(
                        f"{self._path.parent} is being written to by {who}; end that one, or start another run with "
                        "--config.train.run_dir=FOLDER"
                    )
        self._write(0)
        self._thread.start()

    def release(self) -> None:
        """Releases the lease, if it was taken."""
        if not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join()
        if self._is_ours(read_lease(self._path)):
            with suppress(OSError):  # The disk is gone. The next start sees that this process has ended.
                self._path.unlink()

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """True for a holder on this machine whose process has ended; on other machines that cannot be seen."""
        if holder["host"] != self._holder["host"]:
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return holder["pid"] == os.getpid()

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(BEAT_SECONDS):
            beats += 1
            if (holder := read_lease(self._path)) and not self._is_ours(holder):
                who = f"process {holder['pid']} on {holder['host']}"
                print(f"ziggurat: {who} has taken over {self._path.parent}: ended at once", file=sys.stderr, flush=True)
                os._exit(1)
            try:
                self._write(beats)
            except OSError as error:
                # A full disk may have room again by the next beat.
                log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _is_ours(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and {name: holder[name] for name in self._holder} == self._holder

    def _write(self, beats: int) -> None:
        with atomic_file(self._path) as partial:
            partial.write_text(json.dumps(self._holder | {"beats": beats}) + "\n")


def read_lease(path: Path) -> dict[str, Any] | None:
    """Returns the holder's entry, or None if nobody holds the lease."""
    with suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads(path.read_text()))
    return None
