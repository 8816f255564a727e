"""Global batches: the same on any devices, any share of the streams and any number of workers (C1)."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data.config import DataConfig
from data.corpus import open_corpus
from data.errors import InputError
from data.loader import Loader, gather_positions
from data.tokenizer import train_tokenizer
from tests.data.texts import code

CONFIG = DataConfig(segment_length=32, num_streams=4, chunk_bytes=20_000, shuffle_bytes=50_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("loader")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text[:6000]}) + "\n" for text in code()))
    tokenizer = train_tokenizer(code()[:10], 1000, folder / "tokenizer")
    return open_corpus(str(folder / "a.jsonl"), CONFIG), tokenizer


def loader(made, devices: int = 1, positions=None, sizes=None, **changes) -> Loader:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    config = dataclasses.replace(CONFIG, **changes)
    corpus, tokenizer = made
    return Loader(corpus, tokenizer, config, 0, sizes or itertools.repeat(8), 4, sharding, positions)


def take(loader: Loader, count: int):
    with loader:
        return [(jax.device_get(batch), positions) for batch, positions in itertools.islice(loader, count)]


def assert_same(one, other):
    for (batch, positions), (other_batch, other_positions) in zip(one, other, strict=True):
        np.testing.assert_array_equal(positions, other_positions)
        assert batch.keys() == other_batch.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other_batch[name])


def test_devices_workers_and_prefetch_change_nothing(made):
    expected = take(loader(made), 6)
    assert expected[0][0]["tokens"].shape == (8, 32)
    assert_same(take(loader(made, devices=4), 6), expected)
    assert_same(take(loader(made, prefetch=5), 6), expected)
    assert_same(take(loader(made, num_workers=2), 6), expected)


def test_positions_of_what_was_taken_restore_the_rest(made):
    expected = take(loader(made), 9)
    positions = gather_positions(expected[3][1])
    assert positions.shape == (4, 4)
    assert_same(take(loader(made, positions=positions), 5), expected[4:])


def test_a_process_reads_the_streams_of_its_own_rows_alone(made):
    whole = loader(made, devices=4)

    class Half:
        """A sharding of which this process has the second half."""

        def addressable_devices_indices_map(self, shape):
            rows = shape[0] // 4
            cuts = {2: slice(2 * rows, 3 * rows), 3: slice(3 * rows, 4 * rows)}
            return {f"device {i}": (cut, slice(None)) for i, cut in cuts.items()}

    mine = Loader(*made, CONFIG, 0, itertools.repeat(8), 4, Half())  # type: ignore[arg-type]
    assert sorted(mine._streams) == [2, 3]
    assert sorted(whole._streams) == [0, 1, 2, 3]
    for v in (2, 3):
        for _ in range(4):
            row, position = next(mine._streams[v])
            expected, expected_position = next(whole._streams[v])
            assert position == expected_position
            np.testing.assert_array_equal(row["tokens"], expected["tokens"])


def test_rows_are_stream_major(made):
    batch, _ = take(loader(made), 1)[0]
    fresh = loader(made)
    for b in range(8):
        row, _ = next(fresh._streams[b * 4 // 8])
        np.testing.assert_array_equal(batch["tokens"][b], row["tokens"])


def test_batches_that_grow_read_on_in_every_stream(made):
    sizes = [4, 4, 8, 8, 16, 16]
    batches = take(loader(made, sizes=iter(sizes)), 6)
    streams = loader(made)._streams
    for (batch, positions), size in zip(batches, sizes, strict=True):
        assert batch["tokens"].shape == (size, 32)
        for b in range(size):
            row, position = next(streams[b * 4 // size])
            np.testing.assert_array_equal(batch["tokens"][b], row["tokens"])
            assert b * 4 // size == (b + 1) * 4 // size or tuple(positions[b * 4 // size]) == position
    assert_same(take(loader(made, devices=4, sizes=iter(sizes)), 6), batches)
    for done in range(1, 6):
        rest = loader(made, positions=batches[done - 1][1], sizes=iter(sizes[done:]))
        assert_same(take(rest, 6 - done), batches[done:])


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(tmp_path, made):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "word " * 100}) + "\n") * 400)
    corpus = open_corpus(str(path), CONFIG)
    path.write_text(path.read_text().replace('"text"', '"tex_"'))
    with pytest.raises(InputError, match=r"a\.jsonl:\d+: has no field 'text'"):
        take(loader((corpus, made[1])), 50)
