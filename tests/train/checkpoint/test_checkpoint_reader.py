"""Reading a checkpoint layer by layer: damage is reported once an array has been read to its end."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath

from data.errors import InputError
from model.parameters import Parameter
from model.trees import flattened
from train.checkpoint.checkpoint import Checkpoints
from train.checkpoint.checkpoint_reader import CheckpointReader
from train.checkpoint.checksum import checksums, partial_checksum
from train.config.config import CheckpointConfig
from train.devices.mesh import one_device_mesh

LAYERS, WIDTH = 6, 512
TABLE = {
    "embedding.table": Parameter({"vocabulary": 256, "model": 8}, (), "embedding"),
    "embedding.smear": Parameter({}, (), "scalar"),
    "blocks.norm.scale": Parameter({"layers": LAYERS, "width": WIDTH}, (), "norm"),
    "blocks.up": Parameter({"layers": LAYERS, "model": WIDTH, "feedforward": WIDTH}, ("model",), "matrix"),
}


def bytes_read() -> int:
    """Counts bytes that TensorStore reads from files in this process."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """(folder of checkpoints, its weights by name) with a layer of 1 MiB."""
    folder = tmp_path_factory.mktemp("stored")
    random = np.random.default_rng(0)
    flat = {name: np.asarray(random.normal(size=p.shape), np.float32) for name, p in TABLE.items()}
    blocks = {"norm": {"scale": flat["blocks.norm.scale"]}, "up": flat["blocks.up"]}
    with jax.set_mesh(one_device_mesh()):
        embedding = {name: flat[f"embedding.{name}"] for name in ("table", "smear")}
        weights = jax.tree.map(jnp.asarray, {"embedding": embedding, "blocks": blocks})
        checkpoints = Checkpoints(folder, CheckpointConfig())
        checkpoints.save({"step": jnp.int32(0), "weights": weights}, {})
        checkpoints.wait()
        checkpoints.close()
    return folder, flat


def opened(folder: Path) -> CheckpointReader:
    checkpoints = Checkpoints(folder)
    step, weights = checkpoints.open_weights(TABLE)
    checkpoints.close()
    assert step == 0
    return weights


@pytest.mark.parametrize("shape", [(7,), (3, 5, 11), (700_001,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_checksum_is_the_sum_of_its_parts(shape: tuple[int, ...], dtype: jnp.dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    with jax.set_mesh(one_device_mesh()):
        whole = int(checksums(jnp.asarray(array)))
    flat = array.reshape(-1)
    cuts = [0, *sorted({1, flat.size // 3, flat.size})]
    parts = [partial_checksum(flat[a:b], a) for a, b in itertools.pairwise(cuts)]
    assert sum(parts) % 2**32 == whole


def test_a_layer_is_read_without_the_others(saved):
    folder, flat = saved
    read = opened(folder)
    np.testing.assert_array_equal(read("embedding.table", None), flat["embedding.table"])
    np.testing.assert_array_equal(read("embedding.smear", None), flat["embedding.smear"])
    np.testing.assert_array_equal(read("blocks.norm.scale", 3), flat["blocks.norm.scale"][3])
    before = bytes_read()
    np.testing.assert_array_equal(read("blocks.up", 4), flat["blocks.up"][4])
    assert WIDTH * WIDTH * 4 <= bytes_read() - before < 1.1 * WIDTH * WIDTH * 4


def damage(folder: Path, array: np.ndarray) -> None:
    """Flips a bit of these values in every file that stores them."""
    for file in (folder / "0" / "weights").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        if (place := content.find(array.tobytes())) >= 0:
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            return
    raise AssertionError("the values are in no file")


def test_a_flipped_bit_is_reported_once_the_last_layer_is_read(saved, tmp_path: Path):
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    damage(folder, saved[1]["blocks.up"][5, 0])
    read = opened(folder)
    for layer in range(LAYERS - 1):
        read("blocks.up", layer)
        read("blocks.up", layer)
    with pytest.raises(InputError, match="blocks.up: its bits are not those that were saved.*RUN@STEP"):
        read("blocks.up", LAYERS - 1)
    read("embedding.table", None)

    metadata = folder / "0" / "progress" / "metadata"
    progress = json.loads(metadata.read_text())
    progress["checksums"]["weights"]["embedding"]["table"] += 1
    metadata.write_text(json.dumps(progress))
    with pytest.raises(InputError, match="holds no checkpoint that can be read"):
        opened(folder)


def test_a_config_of_another_shape_is_an_error(saved):
    folder, _ = saved
    other = TABLE | {"embedding.table": Parameter({"vocabulary": 128, "model": 8}, (), "embedding")}
    sums = flattened(json.loads((folder / "0" / "progress" / "metadata").read_text())["checksums"]["weights"])
    with pytest.raises(InputError, match="it has the shape \\(256, 8\\); by the config it is \\(128, 8\\)"):
        CheckpointReader(epath.Path(folder / "0" / "weights"), sums, other)("embedding.table", None)
