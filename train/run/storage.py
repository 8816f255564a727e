"""Where a run writes: a folder, or for checkpoints a bucket of Google Cloud Storage; and what it means if it cannot."""

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import fsspec
from etils import epath
from orbax.checkpoint.utils import checkpoint_steps

from data.errors import InputError, StorageError
from data.files import remote
from data.files.writable import why_not_writable

# The listings that it would remember don't have what other processes and libraries have written since.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
T = TypeVar("T")
PathLike = os.PathLike[str] | str
PROBE = "may-be-written"
# How the libraries below Orbax and safetensors write the system's number of an error.
_NUMBER = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")


def is_remote(place: PathLike) -> bool:
    """Whether it is in a bucket."""
    return remote.protocol(os.fspath(place)) != ""


def checkpoint_steps_in(place: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first; none if there is no such folder.

    Raises:
        InputError: as `with_input_errors`.
    """
    return with_input_errors(place, lambda: sorted(checkpoint_steps(place)) if place.exists() else [])


def check_writable(place: epath.Path) -> None:
    """InputError where checkpoints cannot be written there; a bucket is asked by a file that is removed again."""
    if is_remote(place):
        files, path = remote.filesystem(os.fspath(place))
        with_input_errors(place, lambda: files.pipe_file(f"{path}/{PROBE}", b"."))
        with_input_errors(place, lambda: files.rm_file(f"{path}/{PROBE}"))
        return
    if problem := why_not_writable(Path(place)):
        raise InputError(f"checkpoint.dir = {place}: {problem}; name another folder")


def check_free_space(folder: PathLike, size: int) -> None:
    """StorageError where the disk of a folder, which exists, has less room than so many bytes."""
    if (free := shutil.disk_usage(folder).free) < size:
        raise StorageError(f"{folder} has {free / 1e6:,.1f} MB free, and {size / 1e6:,.1f} MB are to be written")


def with_input_errors(place: epath.Path, question: Callable[[], T]) -> T:
    """What a file system answers. InputError where a bucket is not there, or says no."""
    if not is_remote(place):
        return question()
    remote.filesystem(os.fspath(place))  # whether a package for it is installed
    try:
        # The library has tried several times itself.
        return remote.with_retries(os.fspath(place), question, tries=1)
    except remote.RemoteError as error:
        text = f"there is no such bucket, or no right to see it ({error})" if error.kind == "missing" else str(error)
        raise InputError(f"checkpoint.dir = {place}: {text}") from None


@contextmanager
def storage_errors(what: str, place: PathLike) -> Iterator[None]:
    """StorageError where the file system of a place refuses what is written in here; other errors pass.

    Args:
        what: it is, for the message.
        place: where it is written.
    """
    try:
        yield
    except Exception as error:  # each library has an error of its own
        if (reason := _refusal(error, place)) is None:
            raise
        raise StorageError(f"{what} cannot be written to {os.fspath(place)}: {reason}{_free(place)}") from error


def _refusal(error: Exception, place: PathLike) -> str | None:
    """What the file system says; none: the error is not its."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := _NUMBER.search(str(error)):
        return os.strerror(int(found[1] or found[2]))
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160) if is_remote(place) else None


def _free(place: PathLike) -> str:
    """How much room is left there, where that is known."""
    try:
        return f" ({shutil.disk_usage(os.fspath(place)).free / 1e6:,.1f} MB free)"
    except OSError:
        return ""
