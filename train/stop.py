"""Ending early, and well: a signal asks, all processes agree, the run saves and says so.

The status of a process that was asked to end is 75 (sysexits' EX_TEMPFAIL): start it again at once.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from train.config.config import Config

PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run has ended before its last step because it was asked to; what it has done is saved.

    Attributes:
        step: the last that is done.
    """

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}")
        self.step = step


class StopSignals:
    """SIGTERM and SIGINT while this is entered: the first is noted where someone will look, the next ends the process.

    A thread of its own hears them, so that they count while the main thread waits for devices or other processes.

    Attributes:
        asked: whether a signal has come.
        noted: whether the first is only noted. Before training begins there is nothing to save, so it ends at once.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None):
        self.asked = self.noted = False
        self._say = say

    def __enter__(self) -> "StopSignals":
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._told.close()
        self._thread.join()
        self._heard.close()

    def _listen(self) -> None:
        while received := self._heard.recv(1):
            if received[0] not in SIGNALS:
                continue
            name = signal.Signals(received[0]).name
            if self.asked or not self.noted:
                print(f"ziggurat: {name}: ended at once; the same command goes on", file=sys.stderr, flush=True)
                os._exit(PREEMPTED)
            self.asked = True
            self._say(f"{name}: stopping after this step; once more ends it at once")


def reset_watchdog(config: Config) -> None:
    """Unless this is called again in time, the process shows where all its threads stand and ends with status 1.

    A collective that waits for a process that is no more, or a dead file system, would wait for ever.
    """
    if config.train.watchdog_seconds:
        # To the descriptor: what stands for standard error may be no file.
        faulthandler.dump_traceback_later(config.train.watchdog_seconds, exit=True, file=2)
