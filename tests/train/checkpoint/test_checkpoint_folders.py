"""The folders of checkpoints: every path is refused or works, and what is in it may change while it is read."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import InputError, StorageError
from launch.local import newest_step
from model.parameters import Parameter
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import CheckpointConfig
from train.run.storage import check_writable, checkpoint_steps_in

STATE = {"step": jnp.int32(3), "weights": {"a": {"b": jnp.arange(8.0)}}, "optimizer": {"m": jnp.arange(4.0)}}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)
TABLE = {"a.b": Parameter({"embed": 8}, (), "norm")}


def save(folder: Path, *steps: int, keep: int = 5) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep))
    for step in steps:
        checkpoints.save(STATE | {"step": step}, {"positions": []})
    checkpoints.wait()
    checkpoints.close()


def read(folder: Path) -> list[int]:
    checkpoints = Checkpoints(folder)
    step, _ = checkpoints.restore_weights(ABSTRACT["weights"])
    opened, weights = checkpoints.open_weights(TABLE)
    assert weights("a.b", None).tolist() == list(range(8))
    checkpoints.close()
    return [step, opened]


# A name of one folder: no slash, no NUL, and few enough bytes.
NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8") | st.sampled_from("[]*?\\!-:%#"), min_size=1)


@settings(max_examples=15)
@given(NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) < 200))
@example("[x]")
@example("a\\b")
@example("a*")
@example("a?")
@example("logs:")
@example("a%20b#c")
@example("\udcff")
def test_a_path_is_refused_before_anything_is_written_or_its_checkpoints_can_be_read(name: str):
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / name / "checkpoints"
        if set("*?[\\\udcff") & set(name) or name.endswith("gs:"):
            with pytest.raises(InputError, match="checkpoints cannot be kept at a path with"):
                check_writable(epath.Path(place))
            assert os.listdir(folder) == []
        else:
            check_writable(epath.Path(place))
            save(place, 3)
            assert read(place) == [3, 3]


@pytest.mark.parametrize("name", ["[x]", "a\\b", "a*", "a?[!b]", "gs:"])
def test_a_run_that_was_moved_to_such_a_path_can_be_read_or_says_why_and_writes_nothing(name: str, tmp_path: Path):
    save(tmp_path / "run" / "checkpoints", 3)
    (tmp_path / "run").rename(tmp_path / name)
    if name in ("a\\b", "gs:"):
        with pytest.raises(InputError, match="rename the folder"):
            read(tmp_path / name / "checkpoints")
    else:
        assert read(tmp_path / name / "checkpoints") == [3, 3]
    with pytest.raises(InputError, match="rename the folder"):
        save(tmp_path / name / "checkpoints", 4)
    assert os.listdir(tmp_path / name / "checkpoints") == ["3"]


def test_a_save_that_cannot_be_read_back_is_an_error(tmp_path: Path, monkeypatch):
    # Orbax then merges nothing, and warns.
    monkeypatch.setattr(epath.Path("/").__class__, "glob", lambda *_: iter(()))
    with pytest.raises(StorageError, match=r"the checkpoint of step 3 in .* cannot be read back \(weights\)"):
        save(tmp_path, 3)


FOREIGN = ["²", "٣", "007", "x_9", "checkpoint_9", "9_²", "9 ", "-9", "9.damaged", "9.orbax-checkpoint-tmp-0", "notes"]


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path):
    for name in FOREIGN:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save(tmp_path / "checkpoints", 3, 4)
    assert checkpoint_steps_in(epath.Path(tmp_path / "checkpoints")) == [3, 4]
    assert newest_step(tmp_path) == 4
    assert read(tmp_path / "checkpoints") == [4, 4]


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(tmp_path: Path, monkeypatch, caplog):
    save(tmp_path, 3)
    newer = iter((4, 5))
    read_all = Checkpoints._read

    def remove_first(self, step, wanted):
        if following := next(newer, None):
            shutil.rmtree(tmp_path / str(step))
            save(tmp_path, following)
        return read_all(self, step, wanted)

    monkeypatch.setattr(Checkpoints, "_read", remove_first)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_weights(ABSTRACT["weights"])[0] == 5
    assert "the checkpoint of step 4 was removed while it was read" in caplog.text
    assert "damaged" not in caplog.text
    checkpoints.close()


def test_a_checkpoint_that_is_removed_while_it_is_read_layer_by_layer_is_not_called_damaged(tmp_path: Path):
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)
    _, weights = checkpoints.open_weights(TABLE)
    (tmp_path / "5").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="5/weights was removed while it was read"):
        weights("a.b", None)
    save(tmp_path, 6)
    assert checkpoints.open_weights(TABLE)[0] == 6
    checkpoints.close()
