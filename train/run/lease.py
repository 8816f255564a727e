"""One writer: the processes that train a run hold its folder, and show that they live.

`lease.json` names them, with a number that grows while they live. Another start takes it over once its holder is dead:
at once where that can be seen, else when the number has not grown for some beats. No clocks are compared.
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
# Beats that must be missing before a holder elsewhere counts as dead.
PATIENCE = 6


class Lease:
    """The right to write to a folder, for process 0 of a run, until `release`.

    Attributes:
        last_beat: when whoever held it before last showed that it lived (seconds since 1970); none: it was released.
    """

    def __init__(self, path: Path):
        self._path = path
        self.last_beat: float | None = None
        self._holder = {"host": socket.gethostname(), "pid": os.getpid(), "begun": time.time()}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Hold it from now on. InputError where its holder lives."""
        found = read_lease(self._path)
        self.last_beat = self._path.stat().st_mtime if found else None
        if found and not self._is_dead(found):
            who = f"process {found['pid']} on {found['host']}"
            log.info("%s may still write to %s; waiting %.0f s for a sign of life", who, self._path.parent,
                     PATIENCE * BEAT_SECONDS)  # fmt: skip
            for _ in range(PATIENCE):
                sleep(BEAT_SECONDS)
                if (now := read_lease(self._path)) and now != found:
                    raise InputError(
                        f"{self._path.parent} is being written to by {who}; end that one, or start another run with "
                        "--config.train.run_dir=FOLDER"
                    )
        self._write(0)
        self._thread.start()

    def release(self) -> None:
        """Let go, where it was taken."""
        if not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join()
        if self._is_ours(read_lease(self._path)):
            with suppress(OSError):  # A disk that has gone; the next start sees that this process is no more.
                self._path.unlink()

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether a holder on this machine is no more; of one elsewhere nobody knows."""
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
            found, beats = read_lease(self._path), beats + 1
            if found and not self._is_ours(found):
                who = f"process {found['pid']} on {found['host']}"
                print(f"ziggurat: {who} has taken over {self._path.parent}: ended at once", file=sys.stderr, flush=True)
                os._exit(1)
            try:
                self._write(beats)
            except OSError as error:
                # A full disk may have room again by the next beat.
                log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and {name: found[name] for name in self._holder} == self._holder

    def _write(self, beats: int) -> None:
        with atomic_file(self._path) as partial:
            partial.write_text(json.dumps(self._holder | {"beats": beats}) + "\n")


def read_lease(path: Path) -> dict[str, Any] | None:
    """The holder's entry; none where nobody holds it."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found
