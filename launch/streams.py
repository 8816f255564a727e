"""Standard streams that take any text, and Ctrl-C that is not lost."""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from data.printable import printable, shown

SECONDS_BETWEEN_INTERRUPTS = 1.0
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class ShownFormatter(logging.Formatter):
    """Formats log lines without control characters and credentials."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class Terminal(io.TextIOWrapper):
    """Standard output on a terminal, which gets no control characters from texts of others."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def is_colored(stream: TextIO) -> bool:
    """True for a terminal of a user who does not refuse colors (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def prepare_streams() -> None:
    """Opens standard streams that are closed, and makes those of output take any text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest free descriptor, that of the stream.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
        encoding = sys.stdout.encoding
        sys.stdout = Terminal(sys.stdout.detach(), encoding=encoding, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # With PYTHONUNBUFFERED a reader that has gone would end a command before it is done.
        sys.stdout.reconfigure(write_through=False)


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Repeats the KeyboardInterrupt of a Ctrl-C until it is being handled.

    Python drops it where it arrives in a destructor or a callback, and libraries drop it with other exceptions. A
    second Ctrl-C ends the process at once. A command that catches the exception and goes on calls `interrupt_handled`.
    """

    def interrupt(number: int, _: Any) -> None:
        if number == signal.SIGINT and signal.getitimer(signal.ITIMER_REAL)[0]:
            os._exit(128 + signal.SIGINT)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_BETWEEN_INTERRUPTS)
        error = sys.exc_info()[1]
        while error is not None and not isinstance(error, KeyboardInterrupt):
            error = error.__context__
        if error is None:
            raise KeyboardInterrupt

    # A shell's job in the background ignores Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt_handled() -> None:
    """Stops the repetition of a Ctrl-C, after which the command goes on; the next one is a first one."""
    signal.setitimer(signal.ITIMER_REAL, 0)
