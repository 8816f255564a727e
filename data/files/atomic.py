"""Files and folders that appear whole or not at all, even if the machine fails or several processes write them.

Until it is complete, a file or folder has a hidden name of its own, which its process locks. Files without a lock were
left by processes that have ended, and the next process that writes to the same path removes them.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import InputError

# Errors of renaming a folder where another process has put one, or taken it away.
ANOTHER_WRITER = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields the path of an empty file to write. At the end it is synced to disk and renamed to `path`.

    A link at `path` is replaced, and what it leads to stays: a folder that came from somebody else may hold links to
    anything. After an exception the file is removed, and what was at `path` stays. Missing parent folders are made. An
    OSError names `path`.
    """
    path = path.absolute()
    with _partial(path, Path.touch) as partial:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)


@contextmanager
def atomic_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill. At the end all its files are synced to disk, and it is renamed to `folder`.

    Args:
        replace: a folder that is there already is replaced at the end; after an exception it stays.

    Raises:
        InputError: there is something that may not be replaced, or another process writes the folder.
        OSError: it cannot be written; the error names `folder`.
    """
    folder = folder.resolve()
    if not replace:
        check_new(folder)
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced as a whole; name a folder within it")
    if any(map(_is_locked, unfinished(folder))):
        raise InputError(f"{folder} is being written by another process; wait for it, or name another folder")
    before, old = _identity(folder), hidden(folder, secrets.token_hex(4), "old")
    with _partial(folder, Path.mkdir) as partial:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        try:
            if replace and before:
                folder.rename(old)
                if _identity(old) != before:
                    raise FileExistsError(errno.EEXIST, "another one is there", str(folder))
            partial.rename(folder)
        except OSError as error:
            with suppress(OSError):
                old.rename(folder)
            if error.errno not in ANOTHER_WRITER:
                raise
            raise InputError(f"{folder} has been written by another process meanwhile; name another folder") from None
        _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def create_file(path: Path, content: bytes) -> bool:
    """Creates a file, whole at once and on disk; False if it exists. Of several processes, one succeeds."""
    new = hidden(path, secrets.token_hex(4), "new")
    try:
        new.write_bytes(content)
        _sync(new)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        except OSError:  # Some file systems have no links.
            with suppress(FileExistsError), path.open("xb") as file:
                file.write(content)
                return True
            return False
    finally:
        new.unlink(missing_ok=True)
    return True


def check_new(folder: Path) -> None:
    """Raises InputError unless a folder is empty, or not there."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} is there already; name a new folder")


def hidden(path: Path, token: str, kind: str) -> Path:
    """Returns the path of a file or folder that serves to write another: kind "new", "partial" or "old"."""
    return path.with_name(f".{path.name}.{token}.ziggurat-{kind}")


def unfinished(path: Path) -> list[Path]:
    """Returns the hidden files and folders that are, or were, on their way to a path."""
    # Versions up to 0.7 wrote all to one name.
    name = re.compile(rf"\.{re.escape(path.name)}\.(\w+\.)?ziggurat-(new|partial|old)")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return [path.with_name(other) for other in names if name.fullmatch(other)]


@contextmanager
def _partial(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Makes and locks a file or folder that is to become `path`, and at the end removes what is left of it.

    An OSError of writing it names `path`; that of a full disk names no file.
    """
    partial = hidden(path, secrets.token_hex(4), "partial")
    new = partial.with_suffix(".ziggurat-new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        make(new)
        # NFS locks a file exclusively only for those who may write to it.
        with _open(new, os.O_RDONLY if new.is_dir() else os.O_RDWR) as descriptor:
            # Some network file systems have no locks. There, what a kill leaves stays.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now, since others remove what is not locked.
            new.rename(partial)
            yield partial
    except OSError as error:
        if error.errno is None or not str(error.filename or partial).startswith((str(partial), str(new))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(partial)


def _clear(path: Path) -> None:
    """Removes what processes that have ended left unfinished; a folder that one had put aside comes back."""
    for left in unfinished(path):
        if left.suffix == ".ziggurat-old" and not path.exists():
            left.rename(path)
        elif left.suffix != ".ziggurat-new" and _is_locked(left) is False:
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino
    return None


def _is_locked(path: Path) -> bool | None:
    """True if a process holds the lock of a file or folder, None if that cannot be seen."""
    try:
        with _open(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, BlockingIOError)
    except OSError:
        return None
    return False


def _sync(path: Path) -> None:
    with _open(path) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a folder.
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


@contextmanager
def _open(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
