"""The files of a corpus: listed, and read from any byte on, on local disks and wherever fsspec reads."""

import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from data.errors import InputError
from data.files import remote
from data.files.local_tree import find_files, status_of
from data.files.ranges import READ_TOTALS, RangeReader, problem_of
from data.printable import lacks_credentials, printable_name

log = logging.getLogger("ziggurat")
END_BYTES = 2**16
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class File:
    """A file as it was listed.

    Attributes:
        path: a local path, or a URL that fsspec reads.
        name: path relative to the common folder of the listing, with "/".
        size: size in bytes, or -1 if it is unknown or parts of the file cannot be read.
        version: identifies the content: the ETag or similar of a remote file ("" if there is none), or the mtime in
            nanoseconds of a local file.
    """

    path: str
    name: str
    size: int
    version: str


# The fingerprints of local files that have been computed, and whether they are of the whole content.
_FINGERPRINTS: dict[File, tuple[str, bool]] = {}


def is_local(file: File) -> bool:
    """True if the file is read from this machine's file system."""
    return not remote.protocol(file.path)


def list_files(
    where: str, endings: tuple[str, ...], leave_out: Path | None = None, field: str = "data.corpus"
) -> list[File]:
    """Lists a file, the files of a folder and its subfolders, or those of a glob (`**` is any depth), by name.

    Hidden files in a folder, and those with other endings, are ignored. A local folder counts once (`local_tree`).

    Args:
        where: a path (~ is the home folder) or a URL.
        endings: endings of file names that can be read, several.
        leave_out: a local folder whose files are ignored, unless `where` is inside it.
        field: name of the setting in messages.

    Raises:
        InputError: there is no file, its name has another ending, or access is refused. Each line names the field.
        ConnectionError: it cannot be reached.
    """
    if remote.protocol(where) in ("file", "local"):
        where = where.partition("://")[2]
    if lacks_credentials(where):
        raise InputError(f"{field} = {where}: a run keeps no credentials; give the whole URL again")
    try:
        if remote.protocol(where):
            kind, files = _list_remote(where, endings)
        else:
            where = os.path.expanduser(where)
            kind, files = _list_local(where, endings, leave_out)
    except remote.RemoteError as error:
        raised = ConnectionError if error.kind == "outage" else InputError
        raise raised(f"{field} = {where}: {error}") from None
    except InputError as error:
        raise InputError(f"{field} = {error}") from None
    readable = f"{', '.join(endings[:-1])} or {endings[-1]}"
    if not files:
        problem = {
            "folder": f"the folder holds no {readable} file",
            "glob": "matches no file",
            "file": "there is no such file or folder",
        }[kind]
        raise InputError(f"{field} = {where}: {problem}")
    for file in files:
        if not file.name.endswith(endings):
            raise InputError(f"{field} = {where}: {printable_name(file.name)} is no {readable}; convert or rename it")
        if file.size < 0:
            raise InputError(
                f"{field} = {where}: the server of {file.path} does not say its size, or cannot send parts of it; "
                "download it"
            )
    return sorted(files, key=lambda file: file.name)


def _list_local(where: str, endings: tuple[str, ...], leave_out: Path | None) -> tuple[str, list[File]]:
    """Returns the kind of a local place (file, folder or glob) and its files."""
    path, pattern, kind = Path(where), ["**"], "folder"
    status = status_of(where)
    if status and not stat.S_ISDIR(status.st_mode):
        found = [(path.name, status)] if stat.S_ISREG(status.st_mode) else []
        kind, root = "file", path.parent
    else:
        if status is None:
            pattern = list(itertools.dropwhile(lambda part: not glob.has_magic(part), path.parts))
            kind = "glob" if pattern else "file"
        root = Path(*path.parts[: len(path.parts) - len(pattern)]) if kind == "glob" else path
        left_out = leave_out and leave_out.resolve()
        if left_out and Path(os.path.realpath(root)).is_relative_to(left_out):
            left_out = None
        is_there = status_of(str(root)) is not None
        found = (
            list(find_files(str(root), pattern, endings if kind == "folder" else ("",), left_out)) if is_there else []
        )
    names: dict[tuple[int, int], str] = {}
    for name, status in found:
        if (first := names.setdefault((status.st_dev, status.st_ino), name)) != name:
            log.warning(
                "%s and %s are one file, so its text is read twice", printable_name(first), printable_name(name)
            )
    return kind, [
        File(os.path.join("" if root == Path() else root, name), name, status.st_size, str(status.st_mtime_ns))
        for name, status in found
    ]


def _list_remote(where: str, endings: tuple[str, ...]) -> tuple[str, list[File]]:
    files, path = remote.filesystem(where)
    is_http = remote.store(where) == "http"
    magic = re.search(r"[*\[]" if is_http else r"[*?\[]", path)
    # As on a disk, a name that is there is no glob. A server may answer anything about a name with a *.
    is_name = magic and not (is_http and "*" in path) and _unless_missing(where, lambda: files.info(path)) is not None
    if magic and not is_name:
        kind, root = "glob", path[: magic.start()].rpartition("/")[0]
        infos = remote.with_retries(where, lambda: files.glob(path, detail=True))
        if not infos:
            # A glob finds nothing as well if access is refused.
            _unless_missing(where, lambda: files.ls(root))
    else:
        kind, root = "file", path.rpartition("/")[0]
        info = _unless_missing(where, lambda: files.info(path))
        if info is None:
            return kind, []
        infos = {path: info}
        if info["type"] == "directory" or (is_http and urlsplit(path).path.endswith("/")):
            kind, root = "folder", path.rstrip("/")
            infos = remote.with_retries(where, lambda: files.find(path, detail=True))
    listed = []
    asks_for_hidden = kind == "glob" and _is_hidden(path[len(root) :])
    for place, info in infos.items():
        name = place[len(root) :].lstrip("/")
        if is_http:
            name = urlsplit(name).path
        if info["type"] == "file" and (kind != "folder" or name.endswith(endings)):
            url = files.unstrip_protocol(place)
            if info.get("size") is None:
                # Links of a page come without.
                info = remote.with_retries(url, partial(files.info, place))
            is_readable = info.get("size") is not None and info.get("partial") is not False
            size = int(info["size"]) if is_readable else -1
            if kind == "file" or asks_for_hidden or not _is_hidden(name):
                listed.append(File(url, name, size, remote.content_version(info)))
    return kind, listed


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _unless_missing(where: str, call: Callable[[], Any]) -> Any:
    """Returns the result of a call, or None if the place does not exist."""
    try:
        return remote.with_retries(where, call)
    except remote.RemoteError as error:
        if error.kind != "missing":
            raise
        return None


class _LocalFile(io.FileIO):
    """A local file that counts the bytes read."""

    def readinto(self, buffer: Any) -> int | None:
        number = super().readinto(buffer)
        READ_TOTALS["bytes"] += number or 0
        return number


def open_file(file: File, begin: int = 0, end: int | None = None) -> BinaryIO:
    """Opens a file for buffered, seekable reading from a byte on. A remote file is read in ranges on demand.

    Args:
        end: byte at which the reader will probably stop, which limits reading ahead; None for the end of the file.

    Raises:
        InputError: access is refused.
        ChangedFile: the file has vanished or changed since it was listed; reading from it may raise both, too.
        ConnectionError: the file cannot be read after several tries.
    """
    if not is_local(file):
        stop = file.size if end is None else end
        return io.BufferedReader(RangeReader(file.path, file.size, file.version, begin, stop))
    try:
        raw = _LocalFile(file.path)
    except FileNotFoundError:
        raise problem_of("missing") from None
    except PermissionError as error:
        raise InputError(f"{printable_name(file.path)} cannot be read: {error.strerror}") from None
    status = os.fstat(raw.fileno())
    version = str(status.st_mtime_ns)
    if status.st_size != file.size or (version != file.version and not _has_same_content(file, version)):
        raw.close()
        raise problem_of("changed")
    raw.seek(begin)
    return io.BufferedReader(raw)


def set_expected_end(stream: BinaryIO, end: int) -> None:
    """Sets the byte at which the reader of an open file will probably stop, so that no more is read."""
    if isinstance(raw := getattr(stream, "raw", None), RangeReader):
        raw.end = end


def _has_same_content(file: File, version: str) -> bool:
    """True if a local file that was touched has the fingerprint from before, if that is known."""
    touched = replace(file, version=version)
    if file in _FINGERPRINTS and touched not in _FINGERPRINTS:
        fingerprint(touched, _FINGERPRINTS[file][1])
    return file in _FINGERPRINTS and _FINGERPRINTS[file] == _FINGERPRINTS[touched]


def fingerprint(file: File, whole: bool) -> str:
    """Returns the SHA-256 (hex) of a file's name, size and content (or its ends alone), but not of its path.

    A remote file with a version is identified by that, without reading. With the fingerprint of a local file, it is
    still read after its time of change alone has changed. Raises as `open_file`.
    """
    checksum = hashlib.sha256(json.dumps([file.name, file.size]).encode())
    if not is_local(file) and file.version:
        checksum.update(file.version.encode())
        return checksum.hexdigest()
    with open_file(file) as stream:
        if whole and is_local(file):
            while piece := stream.read(BLOCK_BYTES):
                checksum.update(piece)
        else:
            checksum.update(stream.read(END_BYTES))
            stream.seek(max(file.size - END_BYTES, 0))
            checksum.update(stream.read(END_BYTES))
    _FINGERPRINTS[file] = checksum.hexdigest(), whole
    return checksum.hexdigest()
