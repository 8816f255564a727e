import logging
import sys
from types import SimpleNamespace

import pytest

from launch.library_errors import short_library_errors


def test_libraries_log_no_tracebacks_while_a_command_runs_and_all_is_restored(caplog, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    hook, logger = sys.unraisablehook, logging.getLogger("absl")
    filters = list(logger.filters)
    closed, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "other"))
    with pytest.raises(KeyboardInterrupt), short_library_errors():
        try:
            raise ValueError("a save failed")
        except ValueError:
            logger.exception("pages")
        logger.warning("a line")
        sys.unraisablehook(closed)
        sys.unraisablehook(other)
        raise KeyboardInterrupt
    assert caplog.messages == ["a line"]
    assert unraisable == [other]
    assert sys.unraisablehook is hook
    assert logger.filters == filters


def test_importing_and_opening_checkpoints_changes_no_hook_or_filter(tmp_path):
    from train.checkpoint.checkpoint import Checkpoints

    hook, filters = sys.unraisablehook, list(logging.getLogger("absl").filters)
    Checkpoints(tmp_path).close()
    assert sys.unraisablehook is hook
    assert logging.getLogger("absl").filters == filters
