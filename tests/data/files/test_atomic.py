import errno
import os
from pathlib import Path

import pytest

from data.files.atomic import atomic_file, atomic_folder, partial_of


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


def test_what_a_kill_has_left_is_overwritten(tmp_path: Path):
    path, folder = tmp_path / "file", tmp_path / "folder"
    partial_of(path).write_text("longer than the new content")
    partial_of(folder).mkdir()
    (partial_of(folder) / "other").write_text("")
    with atomic_file(path) as partial:
        partial.write_text("new")
    with atomic_folder(folder) as partial:
        (partial / "new").write_text("")
    assert path.read_text() == "new"
    assert names(tmp_path) == {"file", "folder"}
    assert names(folder) == {"new"}


def test_a_kill_before_the_rename_leaves_the_old_folder(tmp_path: Path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as partial:
        (partial / "old").write_text("")
    with pytest.raises(Killed), atomic_folder(folder) as partial:
        (partial / "new").write_text("")
        raise Killed
    assert names(folder) == {"old"}
    assert names(tmp_path) == {"folder"}
    with atomic_folder(folder) as partial:
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
