"""Files and folders that appear whole or not at all, even if the machine fails."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_of(path: Path) -> Path:
    """Returns where a file or folder is written until it is complete: a hidden name that users give to nothing."""
    return path.with_name(f".{path.name}.ziggurat-partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. At the end the file is synced to disk and renamed to `path`.

    After an exception the file is removed, and what was at `path` stays. Missing parent folders are made. An OSError
    names `path`.
    """
    path = path.resolve()
    partial = partial_of(path)
    with _errors_naming(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to fill. At the end all its files are synced to disk, and it is renamed to `folder`.

    A folder that is there already stays until the new one is complete, and after an exception. An OSError names
    `folder`.
    """
    folder = folder.resolve()
    partial = partial_of(folder)
    old = folder.with_name(f".{folder.name}.ziggurat-old")
    with _errors_naming(folder, partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _errors_naming(path: Path, partial: Path) -> Iterator[None]:
    """Names `path` in errors of writing: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not str(error.filename or partial).startswith(str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
