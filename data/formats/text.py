"""Plain text: a file is one document, which can be read in pieces. All functions raise as `open_file`."""

from data.errors import BadText
from data.files.listing import File, open_file

# How far behind the wanted place a cut looks for the end of a line.
LINE_BYTES = 2**16


def piece_start(file: File, at: int, end: int) -> int:
    """Returns the byte at which a piece begins that should begin at `at`: after the line that holds it.

    In a very long line it begins at the next character. The result is from 0 to `end`.
    """
    if at <= 0 or at >= end:
        return min(max(at, 0), end)
    with open_file(file, at - 1, end) as stream:
        after = stream.read(min(LINE_BYTES, end - at + 1))
    if (newline := after.find(b"\n")) >= 0:
        return at + newline
    return next_character(file, at, end)


def next_character(file: File, at: int, end: int) -> int:
    """Returns the first byte from `at` on at which a character begins, at most `end`."""
    with open_file(file, at, end) as stream:
        after = stream.read(min(LINE_BYTES, end - at))
    # A character's later bytes are 10xxxxxx.
    return at + next((i for i, byte in enumerate(after) if byte & 0xC0 != 0x80), end - at)


def read_text(file: File, begin: int, end: int) -> str:
    """Returns the text of a byte range. Raises BadText if it is not UTF-8, and as `open_file`."""
    with open_file(file, begin, end) as stream:
        content = stream.read(end - begin)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise BadText(f"byte {begin + error.start} is no UTF-8 ({error.reason}); convert the file") from None
