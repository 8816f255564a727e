import errno
import fcntl
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from data.errors import InputError
from data.files.atomic import atomic_file, atomic_folder

# Writes to a file or a folder, says so, and waits for a line of its input before the end.
WRITER = """
import sys
from contextlib import nullcontext
from pathlib import Path
from data.files.atomic import atomic_file, atomic_folder

with (atomic_file if sys.argv[1] == "file" else atomic_folder)(Path(sys.argv[2])) as partial:
    (partial if sys.argv[1] == "file" else partial / "new").write_text("new")
    print("ready", flush=True)
    sys.stdin.readline()
"""


class Killed(BaseException):
    """Stands for a kill between two instructions."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Killed), atomic_file(path) as partial:
        partial.write_text("ne")
        raise Killed
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def started(kind: str, path: Path) -> subprocess.Popen:
    """Starts a process that has written to a file or a folder, and has not ended it."""
    arguments = [sys.executable, "-c", WRITER, kind, str(path)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_kill_has_left_is_removed(tmp_path: Path):
    for target in ("file", "folder"):
        process = started(target, tmp_path / target)
        process.kill()
        process.wait()
    (tmp_path / ".file.ziggurat-partial").write_text("of version 0.7")
    assert len(names(tmp_path)) == 3
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "new").write_text("")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == {"file", "folder"}
    assert names(tmp_path / "folder") == {"new"}


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path: Path):
    (tmp_path / ".folder.0123abcd.ziggurat-old").mkdir()
    (tmp_path / ".folder.0123abcd.ziggurat-old" / "old").write_text("")
    with pytest.raises(Killed), atomic_folder(tmp_path / "folder", replace=True):
        raise Killed
    assert names(tmp_path / "folder") == {"old"}


def test_a_folder_that_another_process_writes_is_refused_at_once(tmp_path: Path):
    process = started("folder", tmp_path / "folder")
    with pytest.raises(InputError, match="being written by another process"), atomic_folder(tmp_path / "folder"):
        pass
    process.communicate("\n")
    assert names(tmp_path / "folder") == {"new"}
    assert names(tmp_path) == {"folder"}


@pytest.mark.parametrize("kind", ["file", "folder", "replace", "replace what is there"])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_writers_that_do_not_see_each_other_one_is_whole_and_the_other_is_refused(
    tmp_path: Path, kind, first, monkeypatch
):
    def no_locks(*arguments) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "made"
    if kind == "replace what is there":
        path.mkdir()
        (path / "old").write_text("")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    writers = [atomic_file(path) if kind == "file" else atomic_folder(path, "replace" in kind) for _ in range(2)]
    for word, writer in zip("ab", writers, strict=True):
        partial = writer.__enter__()
        for file in [partial] if kind == "file" else [partial / "1", partial / "2"]:
            file.write_text(word)
    writers[first].__exit__(None, None, None)
    refused = nullcontext() if kind == "file" else pytest.raises(InputError, match="by another process meanwhile")
    with refused:
        writers[1 - first].__exit__(None, None, None)
    assert names(tmp_path) == {"made"}
    if kind == "file":
        assert path.read_text() == "ab"[1 - first]
    else:
        assert {file.name: file.read_text() for file in path.iterdir()} == {"1": "ab"[first], "2": "ab"[first]}


def test_a_file_on_nfs_is_left_alone_while_it_is_written(tmp_path: Path, monkeypatch):
    flock = fcntl.flock

    def nfs_flock(descriptor: int, operation: int) -> None:
        writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and not writes:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", nfs_flock)
    with atomic_file(tmp_path / "made") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "made") as second:
            second.write_text("second")
    assert (tmp_path / "made").read_text() == "first"
    assert names(tmp_path) == {"made"}


def test_a_kill_before_the_rename_leaves_the_old_folder(tmp_path: Path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as partial:
        (partial / "old").write_text("")
    with pytest.raises(Killed), atomic_folder(folder, replace=True) as partial:
        (partial / "new").write_text("")
        raise Killed
    assert names(folder) == {"old"}
    assert names(tmp_path) == {"folder"}
    with pytest.raises(InputError, match="is there already"), atomic_folder(folder):
        pass
    with atomic_folder(folder, replace=True) as partial:
        (partial / "new").write_text("")
    assert names(folder) == {"new"}
    assert names(tmp_path) == {"folder"}


def test_all_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((place, (tmp_path / "made").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with atomic_file(tmp_path / "made") as partial:
        partial.write_text("new")
    assert synced == [(partial, False), (tmp_path, True)]
    (tmp_path / "made").unlink()
    synced.clear()
    with atomic_folder(tmp_path / "made") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")
    *before, after = synced
    assert sorted(before) == [(path, False) for path in (partial, partial / "inner", partial / "inner" / "file")]
    assert after == (tmp_path, True)


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_the_error_of_a_full_disk_names_the_path(tmp_path: Path, atomic, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/made'"), atomic(tmp_path / "made") as path:
        (path if atomic is atomic_file else path / "file").write_text("new")
    assert not names(tmp_path)


def test_errors_of_other_files_keep_their_names(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_file(tmp_path / "made"):
        (tmp_path / "other").read_text()


@pytest.mark.parametrize("to", ["mine", "nowhere", "link", "folder"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path, to: str):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(to)
    with atomic_file(tmp_path / "link") as partial:
        partial.write_text("new")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "mine").read_text() == "mine"
    assert names(tmp_path) == {"folder", "link", "mine"}
    assert not names(tmp_path / "folder")
