"""Stopping early: a signal asks, all processes agree, and the run saves and exits.

A process that was asked to stop exits with status 75 (EX_TEMPFAIL of sysexits.h): start it again at once. Only Ctrl-C
before training gives 130, as in other commands.
"""

import faulthandler
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable

from train.config.config import Config

PREEMPTED = 75
# SIGHUP comes as a terminal closes; `nohup` ignores it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns the signals that ask a run to stop in this process: those that it does not ignore."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


def leave_closed_terminal() -> None:
    """Sends output nowhere that would go to a terminal which has closed: writing to it would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), descriptor)


class Stopped(Exception):
    """Raised when the run ends after `step` because it was asked to; its state is saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopSignals:
    """Context manager for SIGTERM, SIGINT and SIGHUP: the first is noted, the second ends the process at once.

    A thread of its own receives them, so that they count while the main thread waits for devices or other processes.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None):
        self.asked = False  # true once a signal has come
        # False before training starts: there is nothing to save, so the first signal ends the process at once.
        self.noted = False
        self._say = say

    def __enter__(self) -> "StopSignals":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in stop_signals()}
        self._wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        while received := self._receiver.recv(1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if received[0] == signal.SIGHUP:
                leave_closed_terminal()
            if self.asked or not self.noted:
                print(f"ziggurat: {name}: ended at once; the same command resumes", file=sys.stderr, flush=True)
                # A scheduler's signal asks for another start, a user's Ctrl-C for none.
                is_interrupt = received[0] == signal.SIGINT and not self.asked
                os._exit(128 + signal.SIGINT if is_interrupt else PREEMPTED)
            self.asked = True
            self._say(f"{name}: stopping after this step; a second one ends it at once")


def reset_watchdog(config: Config) -> None:
    """Restarts the watchdog, which shows all threads and exits with status 1 unless it is restarted in time.

    A collective with a process that is gone, or a dead file system, would block forever.
    """
    if config.train.watchdog_seconds:
        # File descriptor 2, because sys.stderr may be replaced by an object that is not a file.
        faulthandler.dump_traceback_later(config.train.watchdog_seconds, exit=True, file=2)
