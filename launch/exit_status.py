"""Prints errors and gives each its exit status."""

import errno
import os
import select
import sys
import time
import traceback
from typing import NoReturn

from data.errors import Fault, InputError, StorageError

# The user has to name another path.
PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
# The disk has to be mended.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
SECONDS_FOR_THE_LAUNCHER = 1.0


def report_error(error: BaseException) -> int:
    """Prints an error on standard error; returns its exit status: 2 the user's error, 130 interrupted, 1 a fault."""
    if isinstance(error, InputError):
        lines = str(error).splitlines()
        print("\n".join(line if line.startswith(" ") else f"ziggurat: {line}" for line in lines), file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("ziggurat: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError) and is_output_closed():
        return 1
    place = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in PATH_ERRORS and place != str(error):
        print(f"ziggurat: {place}; name another path", file=sys.stderr)
        return 2
    if isinstance(error, Fault):
        print(f"ziggurat: {error}", file=sys.stderr)
    elif isinstance(error, StorageError) or number in DISK_ERRORS:
        print(f"ziggurat: {place}; once it can be written, the same command resumes the run", file=sys.stderr)
    elif isinstance(error, ConnectionError):
        print(f"ziggurat: {error}; start again once it can be reached", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def is_output_closed() -> bool:
    """True where the reader of standard output has gone, as with `| head`; all later output is then dropped."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    is_closed = bool(poll.poll(0))
    if is_closed:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), output)
    return is_closed


def exit_at_once(error: BaseException) -> NoReturn:
    """Reports an error and ends this process without its libraries' atexit handlers.

    JAX's handler would wait for the other processes, and they for this one; the launcher ends them once this one exits.
    """
    if not isinstance(error, (InputError, KeyboardInterrupt)):
        # The cause may be that another process has failed. Then the launcher ends this one, and the first error counts.
        time.sleep(SECONDS_FOR_THE_LAUNCHER)
    status = report_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
