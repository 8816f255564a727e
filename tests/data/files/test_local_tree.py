"""Local folders are listed whole, each once, whatever is linked to what; what cannot be listed is said."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.files.listing import list_files
from data.formats import ENDINGS

FOLDERS = ("in", "in/a", "in/a/b", "in/c", "out", "out/d")
PLACES = st.sampled_from(range(len(FOLDERS)))


def names_of(where: object, leave_out: Path | None = None) -> list[str]:
    return [file.name for file in list_files(str(where), ENDINGS, leave_out)]


@given(links=st.lists(st.tuples(PLACES, PLACES), max_size=6))
def test_every_folder_that_is_reached_is_listed_once(tmp_path_factory: pytest.TempPathFactory, links):
    root = tmp_path_factory.mktemp("tree")
    reached_from: dict[str, set[str]] = {}
    for folder in FOLDERS:
        (root / folder).mkdir()
        (root / folder / f"{folder.replace('/', '-')}.jsonl").write_text("{}")
        reached_from[folder] = {f for f in FOLDERS if os.path.dirname(f) == folder}
    for number, (at, to) in enumerate(links):
        (root / FOLDERS[at] / f"link{number}").symlink_to(root / FOLDERS[to])
        reached_from[FOLDERS[at]].add(FOLDERS[to])
    expected, todo = set(), ["in"]
    while todo:
        if (folder := todo.pop()) not in expected:
            expected.add(folder)
            todo += reached_from[folder]
    files = list_files(str(root / "in"), ENDINGS)
    assert sorted(os.path.basename(file.name) for file in files) == sorted(
        f"{f.replace('/', '-')}.jsonl" for f in expected
    )
    assert list_files(f"{root}/in/**/*.jsonl", ENDINGS) == files
    assert {"in.jsonl", "a/in-a.jsonl", "a/b/in-a-b.jsonl"} <= {file.name for file in files}
    assert all(Path(file.path).is_file() for file in files)


def test_globs_find_what_they_name(tmp_path: Path, monkeypatch):
    for name in ("a/x.jsonl", "b/x.jsonl", "z.jsonl", ".h/x.jsonl", "a/.i/x.jsonl", "a/.y.jsonl", "c[1]/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    for where, expected in {
        "*/x.jsonl": ["a/x.jsonl", "b/x.jsonl", "c[1]/x.jsonl"],
        "**": ["a/x.jsonl", "b/x.jsonl", "c[1]/x.jsonl", "z.jsonl"],
        "*/../z.jsonl": ["a/../z.jsonl"],
        "a/../b/*.jsonl": ["x.jsonl"],
        ".h": ["x.jsonl"],
        ".h/*": ["x.jsonl"],
        "*/.i/*.jsonl": ["a/.i/x.jsonl"],
        "**/.*/*.jsonl": [".h/x.jsonl", "a/.i/x.jsonl"],
        "a/.*.jsonl": [".y.jsonl"],
        "c[1]": ["x.jsonl"],
        "c[1]/x.jsonl": ["x.jsonl"],
        "c[[]1]/*": ["c[1]/x.jsonl"],
    }.items():
        assert names_of(where) == expected
        assert names_of(tmp_path / where) == expected


def test_what_is_no_file_is_said_and_left_out(tmp_path: Path, caplog):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert names_of(tmp_path) == ["a.jsonl"]
    for name in ("gone", "self", "pipe"):
        assert f"{name}.jsonl is left out" in caplog.text


def test_a_file_with_two_names_is_said(tmp_path: Path, caplog):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{}")
    assert names_of(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert not caplog.messages
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    os.link(tmp_path / "b.jsonl", tmp_path / "d.jsonl")
    assert names_of(tmp_path) == ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
    assert caplog.messages == [
        f"{one} and {other} are one file, so its text is read twice"
        for one, other in (("b.jsonl", "d.jsonl"), ("a.jsonl", "c.jsonl"))
    ]


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch):
    (tmp_path / "deep" / "closed").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_text("{}")
    original = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for where in (
        tmp_path,
        tmp_path / "**" / "*.jsonl",
        tmp_path / "deep" / "*" / "*.jsonl",
        tmp_path / "deep" / "closed",
    ):
        with pytest.raises(InputError, match="data.corpus = .*closed cannot be read: Permission denied; allow it"):
            names_of(where)
    assert names_of(tmp_path / "*.jsonl") == ["a.jsonl"]
