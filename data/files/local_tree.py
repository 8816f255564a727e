"""Local files below a folder, found by a pattern, as `glob` does it, but with every folder read once.

A folder that is linked is read as a folder is, but one that is reached in several ways counts once: so no document is
listed twice, and links that lead back end. Names that begin with a dot are found only by a part of the pattern that
begins with one.
"""

import errno
import fnmatch
import glob
import logging
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from data.errors import InputError
from data.printable import printable_name

log = logging.getLogger("ziggurat")
# Nothing is there, whatever the reason.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


def status_of(path: str) -> os.stat_result | None:
    """Returns the status of a path, links followed; None if nothing is there. InputError if access is refused."""
    try:
        return os.stat(path)
    except PermissionError as error:
        raise _refused(path, error) from None
    except OSError as error:
        if error.errno not in MISSING:
            raise
    except ValueError:  # a NUL in the path
        pass
    return None


def _refused(path: str, error: OSError) -> InputError:
    return InputError(f"{printable_name(path)} cannot be read: {error.strerror}; allow it, or leave it out by a glob")


def find_files(
    root: str, pattern: Sequence[str], endings: tuple[str, ...], leave_out: Path | None
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path relative to the root, status) for each file that matches.

    Args:
        pattern: parts of a glob; `**` is any number of folders.
        endings: files with other endings are ignored.
        leave_out: a folder, resolved, whose files are ignored.

    Raises:
        InputError: a folder may not be read.
    """
    tree = _Tree(root, leave_out)
    *parts, last = (*pattern, "*") if pattern[-1] == "**" else pattern
    folders = [""]
    for part in parts:
        if part == "**":
            folders = list(tree.below(folders))
        elif glob.has_magic(part):
            folders = [os.path.join(f, name) for f in folders for name in _matching(tree.subfolders(f), part)]
        else:
            folders = [os.path.join(f, part) for f in folders if tree.is_folder(os.path.join(f, part))]
    for folder in tree.once(folders):
        entries = {entry.name: entry for entry in tree.entries(folder) if entry.name.endswith(endings)}
        for name in _matching(entries, last):
            status = status_of(entries[name].path)
            if status and stat.S_ISREG(status.st_mode):
                yield os.path.join(folder, name), status
            elif not status or not stat.S_ISDIR(status.st_mode):
                log.warning("%s is left out: it is no file, or a link to nothing", printable_name(entries[name].path))


class _Tree:
    """The folders below a root, named by their paths relative to it. The root's own is empty."""

    def __init__(self, root: str, leave_out: Path | None):
        self._root, self._leave_out = root, leave_out
        self.entries = cache(self._entries)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """Returns what a folder holds: links last, in the order of names."""
        path = self._path(folder)
        try:
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
        except PermissionError as error:
            raise _refused(path, error) from None
        if self._leave_out is None:
            return found
        if self._is_left_out(path):
            return []
        return [entry for entry in found if not entry.is_symlink() or not self._is_left_out(entry.path)]

    def _path(self, folder: str) -> str:
        return os.path.join(self._root, folder) if folder else self._root

    def _is_left_out(self, path: str) -> bool:
        return self._leave_out is not None and Path(os.path.realpath(path)).is_relative_to(self._leave_out)

    def is_folder(self, folder: str) -> bool:
        """True if the path is that of a folder."""
        status = status_of(self._path(folder))
        return status is not None and stat.S_ISDIR(status.st_mode)

    def subfolders(self, folder: str) -> list[str]:
        """Returns the names of the folders in a folder, linked ones last."""
        return [
            entry.name
            for entry in self.entries(folder)
            if (self.is_folder(os.path.join(folder, entry.name)) if entry.is_symlink() else entry.is_dir())
        ]

    def below(self, folders: Iterable[str]) -> Iterator[str]:
        """Yields folders and all that are below them, each once: by a link only if there is no other way."""
        queue, links = deque(folders), deque[str]()
        seen: set[tuple[int, int]] = set()
        while queue or links:
            folder = queue.popleft() if queue else links.popleft()
            if self._is_new(folder, seen):
                yield folder
                for name in _matching(self.subfolders(folder), "*"):
                    path = os.path.join(folder, name)
                    (links if os.path.islink(self._path(path)) else queue).append(path)

    def once(self, folders: Iterable[str]) -> Iterator[str]:
        """Yields the folders that are not the same as one before."""
        seen: set[tuple[int, int]] = set()
        return (folder for folder in folders if self._is_new(folder, seen))

    def _is_new(self, folder: str, seen: set[tuple[int, int]]) -> bool:
        status = status_of(self._path(folder))
        if status is None or (identity := (status.st_dev, status.st_ino)) in seen:
            return False
        seen.add(identity)
        return True


def _matching(names: Iterable[str], part: str) -> list[str]:
    """Returns the names that match a part of a pattern."""
    return [name for name in fnmatch.filter(names, part) if part.startswith(".") or not name.startswith(".")]
