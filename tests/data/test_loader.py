"""Global batches: the same on any devices, any share of the streams and any number of workers (C1)."""

import copy
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data.config import DataConfig
from data.errors import Fault
from data.loader import UNREAD, Loader, corpus_has_ended, gather_positions, look_ahead
from data.mixture import POSITION_SIZE, Mixture, open_mixture
from data.segmenter import make_segment
from data.tokenizer.training import train_tokenizer
from tests.data.texts import code

CONFIG = DataConfig(segment_length=32, num_streams=4, chunk_bytes=20_000, shuffle_window=50_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("loader")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text[:6000]}) + "\n" for text in code()))
    tokenizer = train_tokenizer(code()[:10], 1000, folder / "tokenizer")
    return mixture_of(folder / "a.jsonl"), tokenizer


def mixture_of(path, **changes) -> Mixture:
    return open_mixture(dataclasses.replace(CONFIG, corpus=str(path), **changes), lambda: "")


def loader(made, devices: int = 1, positions=None, sizes=None, **changes) -> Loader:
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    config = dataclasses.replace(CONFIG, **changes)
    mixture, tokenizer = made
    return Loader(mixture, tokenizer, config, 0, sizes or itertools.repeat(8), sharding, positions)


def take(loader: Loader, count: int):
    with loader:
        return [(jax.device_get(made.batch), made.positions) for made in itertools.islice(loader, count)]


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


def test_a_document_stands_between_the_two_tokens_of_its_tokenizer(made):
    mixture, tokenizer = made
    between = copy.copy(tokenizer)
    between.bos_ids, between.eos_id = [998], 999
    large = [512]
    [(expected, _)], [(batch, _)] = (take(loader(of, sizes=large), 1) for of in (made, (mixture, between)))
    for name, token in (("tokens", 998), ("targets", 999)):
        there = expected[name] == tokenizer.eos_id
        assert there.any()
        np.testing.assert_array_equal(batch[name], np.where(there, token, expected[name]))


def test_positions_of_what_was_taken_restore_the_rest(made):
    expected = take(loader(made), 9)
    positions = gather_positions(expected[3][1])
    assert positions.shape == (4, 1, POSITION_SIZE)
    assert_same(take(loader(made, positions=positions), 5), expected[4:])


def test_a_process_reads_the_streams_of_its_own_rows_alone(made):
    whole = loader(made, devices=4)

    class Half:
        """A sharding of which this process has the second half."""

        def addressable_devices_indices_map(self, shape):
            rows = shape[0] // 4
            cuts = {2: slice(2 * rows, 3 * rows), 3: slice(3 * rows, 4 * rows)}
            return {f"device {i}": (cut, slice(None)) for i, cut in cuts.items()}

    mine = Loader(*made, CONFIG, 0, itertools.repeat(8), Half())  # type: ignore[arg-type]
    assert sorted(mine._streams) == [2, 3]
    assert sorted(whole._streams) == [0, 1, 2, 3]
    for v in (2, 3):
        for _ in range(4):
            assert tokens(mine, v) == tokens(whole, v)
            np.testing.assert_array_equal(mine._streams[v].positions, whole._streams[v].positions)


def test_rows_are_stream_major(made):
    batch, _ = take(loader(made), 1)[0]
    fresh = loader(made)
    for b in range(8):
        assert batch["tokens"][b].tolist() == tokens(fresh, b * 4 // 8)


def test_batches_that_grow_read_on_in_every_stream(made):
    sizes = [4, 4, 8, 8, 16, 16]
    batches = take(loader(made, sizes=iter(sizes)), 6)
    fresh = loader(made)
    for (batch, positions), size in zip(batches, sizes, strict=True):
        assert batch["tokens"].shape == (size, 32)
        for b in range(size):
            v = b * 4 // size
            assert batch["tokens"][b].tolist() == tokens(fresh, v)
            assert v == (b + 1) * 4 // size or (positions[v] == fresh._streams[v].positions).all()
    assert_same(take(loader(made, devices=4, sizes=iter(sizes)), 6), batches)
    for done in range(1, 6):
        rest = loader(made, positions=batches[done - 1][1], sizes=iter(sizes[done:]))
        assert_same(take(rest, 6 - done), batches[done:])


def tokens(loader: Loader, v: int) -> list[int]:
    """Of the next row of a stream."""
    return make_segment(loader._streams[v].take(0)[1], CONFIG)["tokens"].tolist()


def test_positions_of_other_processes_are_gathered(monkeypatch):
    positions = np.full((4, 2, POSITION_SIZE), UNREAD)
    positions[1:3] = np.arange(-6, 18).reshape(2, 2, POSITION_SIZE)
    np.testing.assert_array_equal(gather_positions(positions), positions)
    others = np.where(positions == UNREAD, -(2**40), UNREAD)
    for order in ([0, 1], [1, 0]):
        halves = np.stack([positions, others])[order].view(np.int32)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine, halves=halves: halves)
        whole = np.where(positions == UNREAD, -(2**40), positions)
        np.testing.assert_array_equal(gather_positions(positions), whole)


@pytest.mark.parametrize("number", [60, 61, 62, 63])
@pytest.mark.parametrize("segmentation", ["concatenate", "pack"])
def test_a_run_of_some_epochs_trains_on_every_row_and_then_ends(tmp_path, made, segmentation, number):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * (10 + i % 50)}) + "\n" for i in range(number)))
    changes = {"epochs": 2, "segmentation": segmentation, "chunk_bytes": 700, "shuffle_window": 3000}
    mixture = mixture_of(path, **changes)
    weight, ends = 0.0, 0
    with loader((mixture, made[1]), **changes) as batches:
        for loaded in batches:
            assert not corpus_has_ended(loaded.streams_left_in, mixture)
            assert loaded.trained == loaded.batch["loss_weights"].sum()
            weight += loaded.trained
            ends += 1
            if corpus_has_ended(loaded.streams_left_after, mixture):
                assert look_ahead(loaded, mixture) == (True, False)
                break
            assert look_ahead(loaded, mixture) == (False, False)
            assert look_ahead(loaded._replace(trained=0), mixture) == (False, True)
    [source] = mixture.sources
    texts = list(source.corpus.training_texts(0))
    assert weight == 2 * sum(len(made[1].encode(text)) + 1 for text in texts)
    assert ends > 3


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for(tmp_path, made):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"text": "word " * 100}) + "\n") * 400)
    mixture = mixture_of(path)
    path.write_text(path.read_text().replace('"text"', '"tex_"'))
    with pytest.raises(Fault, match=r"a\.jsonl.* has changed"):
        take(loader((mixture, made[1])), 50)
