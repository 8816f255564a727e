"""Errors of storage: recognized from every library, and never hiding another error."""

import errno
import http.server
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from etils import epath
from safetensors import SafetensorError

from data.errors import InputError, StorageError
from data.files.listing import list_files
from launch.exit_status import report_error
from tests.peers import require
from train.run.events import Events
from train.run.step_log import StepLog
from train.run.storage import check_writable, checkpoint_steps_in, storage_errors


async def no_sleep(_: float) -> None:
    """Does not wait."""


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Limits the size of every file, which writers see like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "file"), "Read-only file system"),
        (ValueError("Failed to write 63281 bytes to file 8: ... [os_error_code='28']"), "No space left on device"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "Permission denied"),
    ],
)
def test_the_error_of_a_file_system_is_one_line(error: Exception, words: str, tmp_path: Path):
    with pytest.raises(StorageError) as caught, storage_errors("the thing", tmp_path / "there"):
        raise error
    text = str(caught.value)
    assert text.startswith(f"the thing cannot be written to {tmp_path / 'there'}: {words}")
    assert "\n" not in text


def test_errors_name_the_free_space_of_a_disk_and_the_answer_of_a_bucket(tmp_path: Path):
    with pytest.raises(StorageError, match=r"MB free"), storage_errors("it", tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="gs://a/b: KeyError: 'quota'"), storage_errors("it", "gs://a/b"):
        raise KeyError("quota")


def test_another_error_stays_what_it_is(tmp_path: Path):
    with pytest.raises(ValueError, match="shapes"), storage_errors("it", tmp_path):
        raise ValueError("shapes do not fit")


def test_logs_that_cannot_grow_report_it_and_keep_their_lines(tmp_path: Path, caplog):
    log = StepLog(tmp_path / "metrics.jsonl", 0)
    events = Events(tmp_path / "events.jsonl")
    log.write({"step": 1})
    events.write("start", step=0)
    with files_up_to(12):
        with pytest.raises(StorageError, match=r"a line cannot be written to .*metrics.jsonl: File too large"):
            log.write({"step": 2, "long": "x" * 99})
        with pytest.raises(StorageError, match=r"an event cannot be written to .*events.jsonl: File too large"):
            events.write("save", step=1)
        log.close()
    assert "not every line is on disk" in caplog.text
    # The next start continues after the last whole line.
    StepLog(tmp_path / "metrics.jsonl", 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_place_under_a_file_cannot_be_written_to_and_one_that_is_not_there_is_empty(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; name another folder"):
        check_writable(epath.Path(tmp_path / "file" / "checkpoints"))
    check_writable(epath.Path(tmp_path / "none" / "checkpoints"))
    assert checkpoint_steps_in(epath.Path(tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()


class Refuses(http.server.BaseHTTPRequestHandler):
    """A bucket's server that refuses all credentials."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_error(403, explain="not you")

    do_GET = do_PUT = do_POST


def test_credentials_that_a_bucket_refuses_are_named(monkeypatch):
    gcsfs = require("gcsfs")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs.GCSFileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"gs://runs/one: access is refused .*GOOGLE_APPLICATION_CREDENTIALS"):
        check_writable(epath.Path("gs://runs/one"))
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


@pytest.mark.parametrize("url", ["gs://runs/one", "gcs://runs/one"])
def test_a_bucket_that_cannot_be_reached_is_an_outage(url: str, monkeypatch, caplog):
    """Starting again may help, so it is not the user's error."""
    gcsfs = require("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(gcsfs.retry.asyncio, "sleep", no_sleep)
    gcsfs.GCSFileSystem.clear_instance_cache()
    with pytest.raises(
        ConnectionError, match=r"= (gs|gcs)://runs/one: cannot be reached \(ConnectionRefusedError"
    ) as caught:
        check_writable(epath.Path(url)) if url[:3] == "gs:" else list_files(url, (".jsonl",), None, "data.corpus")
    gcsfs.GCSFileSystem.clear_instance_cache()
    assert report_error(caught.value) == 1
    assert not caplog.records  # gcsfs would log a traceback of fifty lines
