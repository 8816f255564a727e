"""The places that a run writes to: folders, or for checkpoints a bucket of Google Cloud Storage; and their errors."""

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import fsspec
from etils import epath
from orbax.checkpoint import path as orbax_path

from data.errors import InputError, StorageError
from data.files import remote
from data.files.writable import why_not_writable

T = TypeVar("T")
PathLike = os.PathLike[str] | str
PROBE_FILE = "may-be-written"
# Orbax lists what each process has written by a glob of the whole path.
GLOBBED = re.compile(r"[*?[]")
# Orbax and tensorstore read backslashes and gs:/ anywhere in a path as their own signs, and decode addresses.
MISREAD, MISREAD_IN_ADDRESSES = re.compile(r"[\\\ud800-\udfff]|gs:/(?!/)"), re.compile(r"[\\\ud800-\udfff%#]|gs:/(?!/)")
# The spellings of an error's errno in the libraries below Orbax and safetensors.
_ERRNO = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


def is_remote(place: PathLike) -> bool:
    """True for a place in a bucket."""
    return remote.protocol(os.fspath(place)) != ""


def checkpoint_steps_in(place: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first. Raises InputError as `with_input_errors`."""

    def steps() -> list[int]:
        found = orbax_path.step.standard_name_format().find_all(place) if place.exists() else ()
        return sorted(checkpoint.step for checkpoint in found)

    return with_input_errors(place, steps)


def check_place(place: epath.Path, writes: bool = True) -> None:
    """Raises InputError if the libraries would misread the path of checkpoints, so that none could be restored."""
    path = os.fspath(place) if is_remote(place) else os.path.abspath(place)
    misread = MISREAD_IN_ADDRESSES if is_remote(place) else MISREAD
    if found := misread.search(path) or (writes and GLOBBED.search(path)):
        path, sign = (text.encode(errors="backslashreplace").decode() for text in (path, found[0]))
        raise InputError(
            f"{path}: checkpoints cannot be kept at a path with {sign}; rename the folder, or name another one "
            "(train.run_dir, checkpoint.dir)"
        )


def check_writable(place: epath.Path) -> None:
    """Raises InputError if checkpoints cannot be written to a place; writes a file to a bucket, and removes it."""
    check_place(place)
    if is_remote(place):
        files, path = remote.filesystem(os.fspath(place))
        with_input_errors(place, lambda: files.pipe_file(f"{path}/{PROBE_FILE}", b"."))
        with_input_errors(place, lambda: files.rm_file(f"{path}/{PROBE_FILE}"))
    elif problem := why_not_writable(Path(place)):
        raise InputError(f"checkpoint.dir = {place}: {problem}; name another folder")


def check_free_space(folder: PathLike, size: int) -> None:
    """Raises StorageError if the disk of an existing folder has fewer bytes free than `size`."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise StorageError(f"{folder} has {free / 1e6:,.1f} MB free, and {size / 1e6:,.1f} MB are to be written")


def with_input_errors(place: epath.Path, question: Callable[[], T]) -> T:
    """Returns what a file system answers.

    Raises:
        InputError: a bucket does not exist or refuses access.
        ConnectionError: it cannot be reached.
    """
    if not is_remote(place):
        return question()
    remote.filesystem(os.fspath(place))  # Raises InputError if its package is not installed.
    try:
        with uncached_listings():
            return remote.with_retries(os.fspath(place), question)
    except remote.RemoteError as error:
        if error.kind == "outage":
            raise ConnectionError(f"checkpoint.dir = {place}: {error}") from None
        is_missing = error.kind == "missing"
        text = f"there is no such bucket, or no permission to see it ({error})" if is_missing else error
        raise InputError(f"checkpoint.dir = {place}: {text}") from None


@contextmanager
def uncached_listings() -> Iterator[None]:
    """Makes filesystems of Google Cloud Storage that are created within keep no listings.

    A kept listing lacks what other processes and libraries write later. Epath's filesystem, which Orbax uses too, is
    created once and then shared.
    """
    before = fsspec.config.conf.get("gcs", {})
    fsspec.config.conf["gcs"] = {**before, "use_listings_cache": False}
    try:
        yield
    finally:
        fsspec.config.conf["gcs"] = before


@contextmanager
def storage_errors(what: str, place: PathLike) -> Iterator[None]:
    """Raises StorageError for an error of the file system of `place`, to which `what` is written; other errors pass."""
    try:
        yield
    except Exception as error:  # Each library has its own errors.
        if (reason := _refusal(error, place)) is None:
            raise
        free = ""
        with suppress(OSError):  # A bucket has no such number.
            free = f" ({shutil.disk_usage(os.fspath(place)).free / 1e6:,.1f} MB free)"
        raise StorageError(f"{what} cannot be written to {os.fspath(place)}: {reason}{free}") from error


def _refusal(error: Exception, place: PathLike) -> str | None:
    """Returns the reason that the file system gives, or None if the error comes from elsewhere."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if match := _ERRNO.search(str(error)):
        return os.strerror(int(match[1] or match[2]))
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160) if is_remote(place) else None
