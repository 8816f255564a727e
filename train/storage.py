"""Where checkpoints are: a folder, or a bucket of Google Cloud Storage."""

import os
from collections.abc import Callable
from typing import TypeVar

from etils import epath
from orbax.checkpoint.utils import checkpoint_steps

from data import remote
from data.errors import InputError

T = TypeVar("T")
PathLike = os.PathLike[str] | str
PROBE = "may-be-written"


def is_remote(place: PathLike) -> bool:
    """Whether it is in a bucket."""
    return remote.protocol(os.fspath(place)) != ""


def steps_in(place: epath.Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first; none where there is no such folder. InputError as `asked`."""
    return asked(place, lambda: sorted(checkpoint_steps(place)) if place.exists() else [])


def check_writable(place: epath.Path) -> None:
    """InputError where checkpoints cannot be written there; a bucket is asked by a file that is removed again."""
    if is_remote(place):
        files, path = remote.filesystem(os.fspath(place))
        asked(place, lambda: files.pipe_file(f"{path}/{PROBE}", b"."))
        asked(place, lambda: files.rm_file(f"{path}/{PROBE}"))
        return
    existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        raise InputError(f"checkpoint.dir = {place}: {existing} {problem}; name another folder")


def asked(place: epath.Path, question: Callable[[], T]) -> T:
    """What a file system answers. InputError where a bucket is not there, or says no."""
    if not is_remote(place):
        return question()
    remote.filesystem(os.fspath(place))  # whether a package for it is installed
    try:
        # The library has tried several times itself.
        return remote.attempt(os.fspath(place), question, tries=1)
    except remote.RemoteError as error:
        text = f"there is no such bucket, or no right to see it ({error})" if error.kind == "missing" else str(error)
        raise InputError(f"checkpoint.dir = {place}: {text}") from None
