"""Recognizes the folder of a run, even of one that was killed as it began."""

from pathlib import Path

import pytest

from data.errors import InputError
from train.prepare import is_claimed
from train.run.folder import Run


# The last two are unfinished files of versions up to 0.7.
@pytest.mark.parametrize(
    "name",
    [
        ".config.json.0123abcd.ziggurat-partial",
        ".lease.json.0123abcd.ziggurat-new",
        ".lease.json.ziggurat-partial",
        "config.json.partial",
    ],
)
def test_a_folder_with_only_an_unfinished_first_file_is_free_for_a_run(tmp_path: Path, name: str):
    (tmp_path / name).write_text("{")
    assert not is_claimed(Run(tmp_path))


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other things than a run"):
        is_claimed(Run(tmp_path))
