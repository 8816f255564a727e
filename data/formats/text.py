"""Plain text: a file is a document, which may be read in pieces."""

from pathlib import Path

from data.errors import InputError

# How far behind the wanted place a cut looks for the end of a line.
LINE_BYTES = 2**16


def cut(path: Path, at: int, end: int) -> int:
    """The byte at which a piece that is wanted to begin at `at` begins: after the line that it falls into.

    In a very long line, at the next character. At least 0, at most `end`.
    """
    if at <= 0 or at >= end:
        return min(max(at, 0), end)
    with path.open("rb") as file:
        file.seek(at - 1)
        after = file.read(min(LINE_BYTES, end - at + 1))
    if (newline := after.find(b"\n")) >= 0:
        return at + newline
    return next_character(path, at, end)


def next_character(path: Path, at: int, end: int) -> int:
    """The first byte from `at` on at which a character begins; at most `end`."""
    with path.open("rb") as file:
        file.seek(at)
        after = file.read(min(LINE_BYTES, end - at))
    # A character's later bytes are 10xxxxxx.
    return at + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), end - at)


def read(path: Path, begin: int, end: int) -> str:
    """The text of these bytes. InputError where they are no UTF-8."""
    with path.open("rb") as file:
        file.seek(begin)
        content = file.read(end - begin)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {begin + error.start} is no UTF-8 ({error.reason}); convert the file") from None
