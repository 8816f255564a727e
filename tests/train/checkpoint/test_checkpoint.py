"""Checkpoints restore every bit on any mesh (C5), and damage is noticed (C8)."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.errors import InputError
from tests.small import mesh_of, small_batch, small_model
from train.checkpoint.checkpoint import Checkpoints
from train.checkpoint.checksum import checksums
from train.checkpoint.trees import restore_structure, to_plain_tree
from train.config.checkpoint_config import CheckpointConfig
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state, make_state
from train.step.step import make_train_step

CONFIG: Config = dataclasses.replace(make_config({"train": {"batch_size": 8}}), model=small_model(num_kv_heads=4))
AVERAGED = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, ema_decay=0.5))
OPTIMIZER = make_optimizer(CONFIG)


def trained(steps: int, config: Config = CONFIG) -> list:
    """The states after each of some steps on the ambient mesh."""
    states = [make_state(config, OPTIMIZER)]
    step = make_train_step(config, OPTIMIZER)
    sharding = batch_sharding(jax.sharding.get_mesh())
    for seed in range(steps):
        # A step takes the memory of the state that it is given.
        given = jax.tree.map(jnp.copy, states[-1])
        states.append(step(given, jax.device_put(small_batch(seed=seed), sharding))[0])
    return states[1:]


def save(folder: Path, *states, keep: int = 5) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=keep))
    for state in states:
        checkpoints.save(state, {"positions": [[1, 2, 3, 4]], "of": int(state["step"])})
        checkpoints.wait()
    checkpoints.close()


def restore(folder: Path, config: Config = CONFIG):
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=5))
    restored = checkpoints.restore(abstract_state(config, OPTIMIZER))
    checkpoints.close()
    return restored


def assert_same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory):
    """A folder with checkpoints of steps 1 and 2, and the second state."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        states = trained(2)
        save(folder, *states)
        return folder, jax.device_get(states[-1])


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {},
        {"fsdp": 8},
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"slices": 2, "fsdp": 2},
    ],
    ids=str,
)
def test_every_bit_comes_back_on_any_mesh(two_steps, shape):
    folder, expected = two_steps
    with jax.set_mesh(mesh_of(**shape)):
        state, progress = restore(folder)
        assert_same(state, expected)
        assert progress["of"] == 2
        assert progress["positions"] == [[1, 2, 3, 4]]
        shapes = abstract_state(CONFIG, OPTIMIZER)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, shapes)


def test_checksums_do_not_depend_on_the_mesh_and_see_each_flipped_bit():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    sums = set()
    for shape, spec in (
        ({}, None),
        ({"fsdp": 4, "tensor": 2}, ("fsdp", "tensor")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (("data", "fsdp"), None)),
    ):
        with jax.set_mesh(mesh_of(**shape)):
            placed = jax.device_put(x, jax.P(*spec)) if spec else jnp.asarray(x)
            sums.add(int(checksums(placed)))
    assert len(sums) == 1
    for place in (0, 77, 127):
        for bit in (0, 13, 31):
            flipped = x.copy()
            flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
            assert int(checksums(jnp.asarray(flipped))) not in sums
    assert int(checksums(jnp.asarray(x[::-1].copy()))) not in sums


def flip_bits(folder: Path) -> int:
    """Flips one bit in each large data file of a checkpoint; returns how many there are."""
    files = [file for file in folder.rglob("d/*") if file.is_file() and file.stat().st_size > 2000]
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    return len(files)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    assert flip_bits(tmp_path / "copy" / "2") > 0
    with jax.set_mesh(mesh_of()):
        state, progress = restore(tmp_path / "copy")
        assert int(state["step"]) == progress["of"] == 1
        assert "the checkpoint of step 2 is damaged" in caplog.text
        assert {path.name for path in (tmp_path / "copy").iterdir()} == {"1", "2.damaged"}
        save(tmp_path / "copy", restore(two_steps[0])[0])
        state, progress = restore(tmp_path / "copy")
        assert int(state["step"]) == progress["of"] == 2
        flip_bits(tmp_path / "copy" / "2")
        flip_bits(tmp_path / "copy" / "1")
        with pytest.raises(InputError, match="all checkpoints in .* are damaged"):
            restore(tmp_path / "copy")


@pytest.mark.parametrize("item", ["weights", "optimizer"])
def test_other_bits_in_any_item_are_seen_even_if_its_files_are_whole(two_steps, tmp_path, caplog, item: str):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "2" / item)
    shutil.copytree(tmp_path / "copy" / "1" / item, tmp_path / "copy" / "2" / item)
    with jax.set_mesh(mesh_of()):
        assert restore(tmp_path / "copy")[1]["of"] == 1
    assert f"the checkpoint of step 2 is damaged ({item}." in caplog.text


def test_a_save_after_a_restore_compiles_no_checksums_again(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        state, _ = restore(tmp_path / "copy")
        compiled = checksums._cache_size()
        save(tmp_path / "copy", {**state, "step": jnp.int32(3)})
        assert checksums._cache_size() == compiled


def test_missing_files_are_damage_too(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "2" / "optimizer")
    (tmp_path / "copy" / "1" / "progress").rename(tmp_path / "copy" / "1" / "gone")
    with jax.set_mesh(mesh_of()), pytest.raises(InputError, match="are damaged"):
        restore(tmp_path / "copy")


def cut(folder: Path) -> None:
    for file in folder.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def changed(*replaced: bytes):
    """Returns a function that replaces the progress by a text, or one text in it by another."""

    def change(folder: Path) -> None:
        file = folder / "progress" / "metadata"
        content = file.read_bytes()
        if len(replaced) == 2:
            assert replaced[0] in content
        file.write_bytes(content.replace(*replaced) if len(replaced) == 2 else replaced[0])

    return change


def in_place_of(file: Path, other: str) -> None:
    file.unlink()
    file.symlink_to(other)


DAMAGES = {
    "truncated": cut,
    "no weights": lambda folder: shutil.rmtree(folder / "weights"),
    "no progress": lambda folder: shutil.rmtree(folder / "progress"),
    "a manifest gone": lambda folder: next(folder.rglob("manifest.ocdbt")).unlink(),
    "no JSON": changed(b'{"posi'),
    "empty": changed(b""),
    "other JSON": changed(b"[]"),
    "nothing in it": changed(b"{}"),
    "a device": lambda folder: in_place_of(folder / "optimizer" / "_METADATA", "/dev/zero"),
    "another position": changed(b"[[1, 2, 3, 4]]", b"[[1, 2, 3, 5]]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_newest_checkpoint_is_set_aside_whatever_its_damage(two_steps, tmp_path, caplog, damage):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    shutil.copytree(two_steps[0] / "1", tmp_path / "copy" / "0.damaged")
    damage(tmp_path / "copy" / "2")
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        state, progress = restore(tmp_path / "copy")
    assert int(state["step"]) == progress["of"] == 1
    assert "the checkpoint of step 2 is damaged" in caplog.text
    # A checkpoint that was set aside earlier is removed.
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"1", "2.damaged"}


def test_checkpoints_are_kept_by_number_and_by_spacing(tmp_path):
    with jax.set_mesh(mesh_of()):
        state = make_state(CONFIG, OPTIMIZER)
        for config, steps, kept in (
            (CheckpointConfig(keep=2, keep_every_steps=4), [2, 4, 6, 8, 10, 12], [4, 8, 10, 12]),
            # These settings may change on resume.
            (CheckpointConfig(keep=1, keep_every_steps=8), [14], [8, 14]),
            (CheckpointConfig(keep=1), [16], [16]),
        ):
            checkpoints = Checkpoints(tmp_path / "kept", config)
            for step in steps:
                checkpoints.save({**state, "step": jnp.int32(step)}, {})
            checkpoints.wait()
            assert checkpoints.steps() == kept
            checkpoints.close()


def test_no_checkpoint_is_none_and_the_newest_stay(tmp_path):
    with jax.set_mesh(mesh_of()):
        assert restore(tmp_path / "empty") is None
        save(tmp_path / "kept", *trained(3), keep=2)
        checkpoints = Checkpoints(tmp_path / "kept")
        assert checkpoints.steps() == [2, 3]
        weights = abstract_state(CONFIG, OPTIMIZER)["weights"]
        assert checkpoints.restore_weights(weights)[0] == 3
        assert checkpoints.restore_weights(weights, 2)[0] == 2
        with pytest.raises(InputError, match=r"no checkpoint of step 9; there are \[2, 3\]"):
            checkpoints.restore_weights(weights, 9)
        checkpoints.close()


def test_an_unfinished_save_is_invisible(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "copy")
    (tmp_path / "copy" / "2").rename(tmp_path / "copy" / "2.orbax-checkpoint-tmp-0")
    with jax.set_mesh(mesh_of()):
        state, _ = restore(tmp_path / "copy")
        assert int(state["step"]) == 1


@pytest.fixture(scope="module")
def two_averaged_steps(tmp_path_factory: pytest.TempPathFactory):
    """A folder like that of `two_steps`, with a moving average of the weights, and its second state."""
    folder = tmp_path_factory.mktemp("averaged")
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        states = trained(2, AVERAGED)
        save(folder, *states)
        return folder, jax.device_get(states[-1])


def items(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_an_average_comes_back_on_another_mesh_and_is_used(two_averaged_steps, two_steps):
    folder, expected = two_averaged_steps
    assert items(folder / "2") == {"weights", "optimizer", "average", "progress"}
    assert items(two_steps[0] / "2") == {"weights", "optimizer", "progress"}
    with jax.set_mesh(mesh_of(fsdp=8)):
        state, progress = restore(folder, AVERAGED)
        assert_same(state, expected)
        assert progress["checksums"]["average"] == jax.tree.map(int, checksums(state["average"]))
        fresh = make_state(AVERAGED, OPTIMIZER)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
    with jax.set_mesh(mesh_of()):
        checkpoints = Checkpoints(folder)
        step, weights = checkpoints.restore_weights(abstract_state(CONFIG, OPTIMIZER)["weights"])
        checkpoints.close()
        assert step == 2
        assert_same(weights, expected["average"])


def test_a_damaged_or_missing_average_is_damage(two_averaged_steps, tmp_path, caplog):
    shutil.copytree(two_averaged_steps[0], tmp_path / "copy")
    assert flip_bits(tmp_path / "copy" / "2" / "average") > 0
    with jax.set_mesh(mesh_of()):
        assert restore(tmp_path / "copy", AVERAGED)[1]["of"] == 1
        assert "the checkpoint of step 2 is damaged" in caplog.text
        shutil.rmtree(tmp_path / "copy" / "1" / "average")
        with pytest.raises(InputError, match="are damaged"):
            restore(tmp_path / "copy", AVERAGED)


def test_an_average_begins_with_the_weights_and_ends_where_it_is_not_wanted(
    two_averaged_steps, two_steps, tmp_path, caplog
):
    with jax.set_mesh(mesh_of(fsdp=4, tensor=2)):
        state, _ = restore(two_steps[0], AVERAGED)
        assert "the average begins with the weights of step 2" in caplog.text
        assert_same(state["average"], two_steps[1]["weights"])
        assert_same({**state, "average": None}, {**two_steps[1], "average": None})
        fresh = make_state(AVERAGED, OPTIMIZER)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
        batch = jax.device_put(small_batch(), batch_sharding(jax.sharding.get_mesh()))
        make_train_step(AVERAGED, OPTIMIZER)(state, batch)
        caplog.clear()
        state, _ = restore(two_averaged_steps[0])
        assert "the average up to step 2 ends there" in caplog.text
        assert_same(state, {name: tree for name, tree in two_averaged_steps[1].items() if name != "average"})


def test_named_tuples_become_dictionaries_and_back():
    with jax.set_mesh(mesh_of()):
        state = abstract_state(CONFIG, OPTIMIZER)["optimizer"]
    as_dictionaries = to_plain_tree(state)
    assert set(as_dictionaries) == {"adam", "schedule"}
    assert set(as_dictionaries["adam"]) == {"count", "mu", "nu"}
    assert jax.tree.structure(restore_structure(state, as_dictionaries)) == jax.tree.structure(state)
