"""A remote file, read in ranges of bytes on demand."""

import importlib
import io
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from data.errors import BadText, ChangedFile, InputError
from data.files.remote import RemoteError, content_version, filesystem, store, with_retries

T = TypeVar("T")
# Bytes of the first range, and of the largest, that are read of a file; each range is GROWTH times the one before.
FIRST_BYTES = 2**16
LARGEST_BYTES = 2**22
# Bytes of the first range beyond where the reader will probably stop: most often the rest of a line.
BEYOND_BYTES = 2**13
GROWTH = 16
# How long an HTTP server may send nothing.
SILENT_SECONDS = 30
# The number of bytes read of local and remote files, by the key "bytes".
READ_TOTALS: Counter[str] = Counter()
# The error and its text by the kind of a `RemoteError`, or of a local file's problem.
PROBLEMS: dict[str, tuple[type[BadText], str]] = {
    "missing": (ChangedFile, "has vanished since the run listed it"),
    "changed": (ChangedFile, "has changed since the run listed it"),
    "no ranges": (BadText, "cannot be read in parts: its server ignores ranges; download it"),
}


def problem_of(kind: str) -> BadText:
    """Returns the error of a kind of `PROBLEMS`."""
    error, text = PROBLEMS[kind]
    return error(text)


class RangeReader(io.RawIOBase):
    """A remote file that is read in ranges: a small one first, then larger ones.

    Args:
        size: expected size in bytes; reading fails if it or the version is another.
        end: byte at which the reader will probably stop; a range ends there. It can be changed later.

    Raises as `open_file`.
    """

    def __init__(self, url: str, size: int, version: str, begin: int, end: int):
        self._url, self._size, self._version, self._at, self.end = url, size, version, begin, end
        self._range, self._begin, self._length = b"", begin, 0
        self._handle = self._try(self._open)

    def _try(self, call: Callable[[], T]) -> T:
        try:
            return with_retries(self._url, call)
        except RemoteError as error:
            if error.kind == "refused":
                raise InputError(f"{self._url}: {error}") from None
            if error.kind in PROBLEMS:
                raise problem_of(error.kind) from None
            raise ConnectionError(f"{self._url} {error}") from None

    def _open(self) -> Any:
        files, path = filesystem(self._url)
        options: dict[str, Any] = {}
        if store(self._url) == "http":
            # A server that compresses what it sends cannot send ranges of the file.
            options["headers"] = files.kwargs.get("headers", {}) | {"Accept-Encoding": "identity"}
            options["timeout"] = importlib.import_module("aiohttp").ClientTimeout(
                sock_connect=SILENT_SECONDS, sock_read=SILENT_SECONDS
            )
            options["size"] = self._size
        handle = files.open(path, "rb", cache_type="none", **options)
        info = getattr(handle, "details", None)
        if not info or not content_version(info):
            info = files.info(path)
        if (info["size"], content_version(info)) != (self._size, self._version):
            raise RemoteError("changed", "")
        if info.get("partial") is False:
            raise RemoteError("no ranges", "")
        return handle

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size or not len(buffer):
            return 0
        if not self._begin <= self._at < self._begin + len(self._range):
            self._fetch(len(buffer))
        first = self._at - self._begin
        content = self._range[first : first + len(buffer)]
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def _fetch(self, wanted: int) -> None:
        is_sequential = self._range and self._at == self._begin + len(self._range) != self.end
        if is_sequential:
            self._length = self._length * GROWTH if self._length >= FIRST_BYTES else FIRST_BYTES
        else:
            self._length = FIRST_BYTES if self._at < self.end else BEYOND_BYTES
        self._length = min(max(self._length, wanted), LARGEST_BYTES)
        stop = min(self._at + self._length, self.end if self._at < self.end else self._size, self._size)

        def fetch() -> bytes:
            self._handle.seek(self._at)
            content = self._handle.read(stop - self._at)
            READ_TOTALS["bytes"] += len(content)
            if len(content) != stop - self._at:
                raise RemoteError("changed", "")
            return content

        self._range, self._begin = self._try(fetch), self._at
