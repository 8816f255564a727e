"""What the user reads of an error, and the exit status that it means."""

import errno
import os
import sys
import time
import traceback
from typing import NoReturn

from data.errors import Fault, InputError, StorageError

# What is wrong with a path, not with this program.
PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
# What is wrong with a disk, and may pass.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
SECONDS_TO_BE_ENDED = 1.0


def report(error: BaseException) -> int:
    """Print an error on standard error; returns its exit status: 2 the user's, 130 interrupted, 1 a fault."""
    if isinstance(error, InputError):
        lines = str(error).splitlines()
        print("\n".join(line if line.startswith(" ") else f"ziggurat: {line}" for line in lines), file=sys.stderr)
        return 2
    if isinstance(error, OSError) and error.errno in PATH_ERRORS and error.filename is not None:
        print(f"ziggurat: {error.filename}: {error.strerror}; name another path", file=sys.stderr)
        return 2
    if isinstance(error, Fault):
        print(f"ziggurat: {error}", file=sys.stderr)
        return 1
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"ziggurat: {where}; once it can be written, the same command goes on", file=sys.stderr)
        return 1
    if isinstance(error, ConnectionError):
        print(f"ziggurat: {error}; start again once it can be reached", file=sys.stderr)
        return 1
    if isinstance(error, KeyboardInterrupt):
        print("ziggurat: interrupted", file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def exit_at_once(error: BaseException) -> NoReturn:
    """Report an error and end this process without the clean-up of its libraries.

    JAX's waits for the other processes, which wait for this one; the launcher ends them as soon as it sees this end.
    """
    if not isinstance(error, (InputError, KeyboardInterrupt)):
        # It may be no more than that another process has ended, for its own reason: the launcher ends this one then.
        time.sleep(SECONDS_TO_BE_ENDED)
    status = report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
