"""JSON and small files that others wrote: bounded, so that a bad file is one error that names it."""

import collections
import json
import re
import stat
from pathlib import Path
from typing import Any

from data.errors import InputError

# The largest file that is read into memory as a whole; tokenizers of 250,000 pieces have 30 MB.
LARGEST_FILE = 2**28
DEEPEST = 100
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_small_file(path: Path) -> bytes:
    """Returns the content of a file. InputError if it is a pipe or a device, or larger than `LARGEST_FILE`."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file; name a file")
    if status.st_size > LARGEST_FILE:
        raise InputError(f"{path} has {status.st_size:,} bytes; at most {LARGEST_FILE:,} are read; restore it")
    return path.read_bytes()


def read_json(path: Path, remedy: str = "restore it") -> dict[str, Any]:
    """Returns the object in a JSON file of settings. InputError names the file, the problem and the remedy."""
    try:
        text = read_small_file(path).decode()
        if ESCAPED_NUL.search(text):
            raise ValueError("it holds a NUL character")
        value = parse_json(text)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (it holds no settings); {remedy}")
    return value


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is no JSON, has a name twice, half a character or an integer of thousands of digits, or is nested
            more than `DEEPEST` levels deep.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise ValueError("nested too deeply")
    if ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it has half a character (a lone surrogate)") from None
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        insides = (node.values() if isinstance(node, dict) else node for node in level)
        level = [item for inside in insides for item in inside if isinstance(item, dict | list)]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"an integer of {len(digits):,} digits") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
