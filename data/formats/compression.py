"""Compressed text: .gz, .zst and .xz, decompressed while it is read."""

import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from data.errors import BadText
from data.files.listing import File, open_file
from data.formats.content import import_reader

COMPRESSIONS = (".gz", ".zst", ".xz")
BLOCK_BYTES = 2**17
# Bytes that a .zst may need of what came before, as a power of 2: what `zstd --long=31` makes is read too.
WINDOW_LOG = 31


def open_text(file: File, ending: str, begin: int = 0, end: int | None = None) -> BinaryIO:
    """Opens the text of a file, decompressed (and not seekable) if its ending is ".gz", ".zst" or ".xz".

    Args:
        begin: first byte to read of an uncompressed file; `end` is that at which the reader will probably stop.

    Raises:
        InputError: a package for the format is missing, or as `open_file`.
        BadText: the file is damaged or ends early (while it is read), or as `open_file`.
    """
    if not ending:
        return open_file(file, begin, end)
    return io.BufferedReader(_Decompressed(open_file(file), ending), BLOCK_BYTES)


def skip_bytes(stream: BinaryIO, number: int) -> int:
    """Skips a number of bytes and returns the number of line ends in them. Raises BadText if there are fewer."""
    lines = 0
    while number > 0:
        if not (piece := stream.read(min(number, BLOCK_BYTES))):
            raise BadText(f"its text ends {number} bytes before the place at which reading goes on")
        number -= len(piece)
        lines += piece.count(b"\n")
    return lines


class _Streams:
    """Concatenated compressed streams, decompressed by `lzma` or `zstd`.

    Their own file objects take damage after the first stream for the end.
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]):
        self._raw, self._new = raw, new
        self._stream: Any = None

    def read1(self, size: int) -> bytes:
        """Returns up to `size` bytes, or none at the end."""
        content = b""
        while not content:
            block = b""
            if self._stream is None or self._stream.eof:
                if not (block := self._next()):
                    break
                self._stream = self._new()
            elif self._stream.needs_input and not (block := self._raw.read(BLOCK_BYTES)):
                raise EOFError
            content = self._stream.decompress(block, size)
        return content

    def _next(self) -> bytes:
        """Returns the first bytes of the next stream, after optional padding of zeros."""
        block = b"" if self._stream is None else self._stream.unused_data
        while not (begin := block.lstrip(b"\0")) and (block := self._raw.read(BLOCK_BYTES)):
            pass
        return begin


class _Decompressed(io.RawIOBase):
    def __init__(self, raw: BinaryIO, ending: str):
        self._raw, self._ending, self._at = raw, ending, 0
        self._errors: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile)
        self._stream: _Streams | gzip.GzipFile
        if ending == ".gz":
            self._stream = gzip.GzipFile(fileobj=raw, mode="rb")
        elif ending == ".xz":
            self._errors = (lzma.LZMAError,)
            self._stream = _Streams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
        else:
            name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
            zstd = import_reader(name, ending, "backports.zstd")
            self._errors = (zstd.ZstdError,)
            options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
            self._stream = _Streams(raw, lambda: zstd.ZstdDecompressor(options=options))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read1(len(buffer))
        except EOFError:
            raise BadText(f"its {self._ending} ends too early, after byte {self._at} of its text") from None
        except self._errors as error:
            raise BadText(f"its {self._ending} is damaged after byte {self._at} of its text: {error}") from None
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._raw.close()
        super().close()
