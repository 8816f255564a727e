"""Keeps the errors that Orbax and asyncio print of their own accord short. Imports neither."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def short_library_errors() -> Iterator[None]:
    """Drops what the libraries print of an error that is also raised: pages of tracebacks, one for each thread."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook = sys.unraisablehook

    def skip_closed_loops(unraisable: Any) -> None:
        # Pending TensorStore reads and writes raise this after one of them has failed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    for logger in loggers:
        logger.addFilter(_has_no_traceback)
    sys.unraisablehook = skip_closed_loops
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger in loggers:
            logger.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None
