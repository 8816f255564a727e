"""Prints errors and gives each its exit status: the one place that knows those of files, disks and environments."""

import errno
import os
import select
import signal
import sys
import time
import traceback
from typing import NoReturn

from data.errors import Fault, InputError, StorageError
from data.printable import shown

# The user has to name another path, or mend this one.
PATH_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EBUSY, errno.ENOTEMPTY, errno.EXDEV, errno.EINVAL, errno.ENXIO, errno.ENODEV,
}  # fmt: skip
# The disk has to be mended.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
SECONDS_FOR_THE_LAUNCHER = 1.0


def report_error(error: BaseException) -> int:
    """Prints an error on standard error; returns its exit status.

    2 is the user's error, 1 a fault, and 128 + n an end by signal n, as a shell gives it: 130 for Ctrl-C, 141 where the
    reader of standard output has gone, as with `| head`, about which there is nothing to print.
    """
    if isinstance(error, BrokenPipeError) and is_output_closed():
        return 128 + signal.SIGPIPE
    status, text = diagnosed(error)
    if text:
        lines = shown(text).splitlines()
        print("\n".join(line if line.startswith(" ") else f"ziggurat: {line}" for line in lines), file=sys.stderr)
    else:
        traceback.print_exception(error)
    return status


def diagnosed(error: BaseException) -> tuple[int, str]:
    """Returns the exit status of an error and its text for a person, which is empty for a fault of this program."""
    match error:
        case InputError():
            return 2, str(error)
        case KeyboardInterrupt():
            return 128 + signal.SIGINT, "interrupted"
        case Fault():
            return 1, str(error)
        case StorageError():
            return 1, f"{error}; once it can be written, the same command resumes the run"
        case SystemExit():
            return 1, f"code that was loaded has ended this process: sys.exit({error.code!r}); take that out"
        case ConnectionError() | TimeoutError():
            return 1, f"{error}; start again once it can be reached"
        case RuntimeError() if str(error).startswith("Symlink loop from"):  # of pathlib before Python 3.13
            return 2, f"{error}; name another path"
        case MemoryError():
            return 1, f"the memory of this machine is full{f' ({error})' if str(error) else ''}; take a larger one"
        case OSError(errno=int(number), strerror=str(reason)):
            place = f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason
            if number in DISK_ERRORS:
                return 1, f"{place}; once it can be written, the same command resumes the run"
            if number in PATH_ERRORS and place != reason:
                return 2, f"{place}; name another path"
            return 1, f"{place}; start again once that is mended"
    from launch.environment import environment_problem

    return environment_problem(error)


def finish_output(status: int) -> int:
    """Writes the rest of standard output; returns the status that this gives a command that has ended with `status`.

    A reader that has gone, as with `| true`, takes nothing from a command that is done.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        if not is_output_closed():
            drop_output()
            return status or report_error(OSError(error.errno, error.strerror, "standard output"))
    return status


def is_output_closed() -> bool:
    """True where the reader of standard output has gone; all later output is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_closed = bool(poll.poll(0))
    if is_closed:
        drop_output()
    return is_closed


def drop_output() -> None:
    """Makes standard output go nowhere: what is left in its buffer would fail again as Python exits."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def exit_at_once(error: BaseException) -> NoReturn:
    """Reports an error and ends this process without its libraries' atexit handlers.

    JAX's handler would wait for the other processes, and they for this one; the launcher ends them once this one exits.
    """
    if not isinstance(error, (InputError, KeyboardInterrupt)):
        # The cause may be that another process has failed. Then the launcher ends this one, and the first error counts.
        time.sleep(SECONDS_FOR_THE_LAUNCHER)
    status = finish_output(report_error(error))
    sys.stderr.flush()
    os._exit(status)
