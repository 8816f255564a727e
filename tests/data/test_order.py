"""C1 and C2 for every format: machines, workers, prefetch and restarts change nothing, and nothing is lost."""

import dataclasses
import gzip
import itertools
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.loader import UNREAD, Loader
from data.mixture import Mixture, open_mixture
from data.tokenizer.tokenizer import Tokenizer
from data.tokenizer.training import train_tokenizer
from tests.data.texts import code
from tests.peers import require

STREAMS = 8
CONFIG = DataConfig(segment_length=24, num_streams=STREAMS, chunk_bytes=3000, shuffle_window=6000)
FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.xz", "separated", "txt", "parquet", "mixture"]
SEPARATOR = "=== next ==="
SHAPES = [{}, {"segmentation": "pack", "shuffle_rows": True}, {"document_mask": False, "train_last_position": False}]


def texts() -> list[str]:
    """Documents of many lengths, with characters of more than a byte."""
    pieces = [text[at : at + 40 + at % 900] for text in code()[:30] for at in range(0, min(len(text), 6000), 700)]
    return [f"{i} é {piece.strip()}" for i, piece in enumerate(pieces)]


def write(folder: Path, form: str) -> tuple[object, dict[str, object]]:
    """(data.corpus, other fields of data) of the same documents in a format."""
    documents = texts()
    lines = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(documents)).encode()
    path = folder / f"a.{form}"
    if form == "mixture":
        parts = {"even": documents[::2], "odd": documents[1::2]}
        for name, part in parts.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        return {
            "even": {"corpus": str(folder / "even.jsonl"), "weight": 3},
            "odd": {"corpus": str(folder / "odd.jsonl")},
        }, {}
    if form == "parquet":
        pyarrow = require("pyarrow")
        parquet = require("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=17)
    elif form == "separated":
        path = folder / "a.txt"
        path.write_text(f"\n{SEPARATOR}\n".join(documents))
        return str(path), {"text_separator": SEPARATOR}
    elif form == "txt":
        for i, text in enumerate(documents):
            (folder / f"{i:04}.txt").write_text(text)
        return str(folder), {}
    elif form == "jsonl.zst":
        zstd = require("backports.zstd")
        path.write_bytes(zstd.compress(lines))
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[form]
        path.write_bytes(compress(lines))
    return str(path), {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code()[:10], 1000, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=FORMATS)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, dict]:
    return write(tmp_path_factory.mktemp("corpus"), request.param)


class Share:
    """The sharding of a batch's rows over processes, as the one with this number sees it."""

    def __init__(self, process: int, processes: int):
        self.process, self.processes = process, processes

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        size = shape[0] // self.processes
        return {"device": (slice(self.process * size, (self.process + 1) * size), slice(None))}


def batches(
    mixture: Mixture,
    tokenizer: Tokenizer,
    config: DataConfig,
    processes: int,
    workers: int,
    begin=None,
    step: int = 0,
    skips: dict[int, int] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]]:
    """The global batches of 8 and 16 rows in turn, and the positions after them, put together of all processes'."""
    config = dataclasses.replace(config, num_workers=workers)
    shares = [Share(process, processes) for process in range(processes)]
    loaders = [
        Loader(mixture, tokenizer, config, 0, [], share, begin, step, skips or {})  # type: ignore[arg-type]
        for share in shares
    ]
    try:
        for s in itertools.count(step):
            rows: dict[int, dict[str, np.ndarray]] = {}
            where = np.full_like(loaders[0]._read(s, 0)[1], UNREAD)
            left = 0
            for loader in loaders:
                read, positions, of_process, _ = loader._read(s, 8 * (1 + s % 2))
                assert rows.keys().isdisjoint(read)
                rows, where, left = rows | read, np.maximum(where, positions), left + of_process
            assert sorted(rows) == list(range(8 * (1 + s % 2)))
            yield {name: np.stack([rows[b][name] for b in sorted(rows)]) for name in rows[0]}, where, left
    finally:
        for loader in loaders:
            if loader._tokenizing:
                loader._tokenizing.close()


def opened(corpus: tuple[object, dict], **changes: object) -> tuple[Mixture, DataConfig]:
    where, fields = corpus
    config = dataclasses.replace(CONFIG, corpus=where, **(fields | changes))
    return open_mixture(config, lambda: ""), config


@hypothesis.settings(max_examples=4)
@given(
    processes=st.sampled_from([1, 2, 4, 8]),
    after=st.sampled_from([1, 2, 4, 8]),
    workers=st.sampled_from([0, 1, 3]),
    stop=st.integers(1, 30),
    shape=st.sampled_from(SHAPES),
    skips=st.dictionaries(st.integers(0, 35), st.integers(1, 3), max_size=2),
)
def test_processes_workers_and_restarts_change_no_byte(
    corpus, tokenizer, processes, after, workers, stop, shape, skips
):
    mixture, config = opened(corpus, **shape)
    expected = list(itertools.islice(batches(mixture, tokenizer, config, 1, 0, skips=skips), stop + 6))
    one = batches(opened(corpus, **shape)[0], tokenizer, config, processes, workers, skips=skips)
    found = list(itertools.islice(one, stop))
    rest = batches(opened(corpus, **shape)[0], tokenizer, config, after, 0, found[-1][1], stop, skips)
    found += itertools.islice(rest, 6)
    for (batch, positions, _), (other, other_positions, _) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(positions, other_positions)
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name])


def test_what_is_left_out_is_read_and_told_and_what_comes_behind_it_moves_up(corpus, tokenizer):
    mixture, config = opened(corpus)
    loader = lambda skips: Loader(mixture, tokenizer, config, 0, [], Share(0, 1), None, 0, skips)  # type: ignore[arg-type]
    straight, skipping = loader({}), loader({2: 2})
    expected = [straight._read(s, 8) for s in range(6)]
    found = [skipping._read(s, 8) for s in range(4)]
    for s, of in ((0, 0), (1, 1), (2, 4), (3, 5)):
        for b in range(8):
            np.testing.assert_array_equal(found[s][0][b]["tokens"], expected[of][0][b]["tokens"])
        np.testing.assert_array_equal(found[s][1], expected[of][1])
    told = found[2][3]
    assert [(row["batch"], row["row"]) for row in told] == [(batch, b) for batch in (0, 1) for b in range(8)]
    for row in told:
        tokens = expected[2 + row["batch"]][0][row["row"]]["loss_weights"].sum()
        assert sum(part["tokens"] for part in row["parts"]) == tokens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_epochs_train_twice_on_every_token_of_the_corpus(corpus, tokenizer, shape):
    mixture, config = opened(corpus, epochs=2, **shape)
    found: Counter[int] = Counter()
    for batch, _, left in batches(mixture, tokenizer, config, 2, 0):
        found.update(batch["targets"][batch["loss_weights"] > 0].tolist())
        if not left.any():
            break
    expected: Counter[int] = Counter()
    for source in mixture.sources:
        for document in (document for chunk in source.corpus.chunks for document in source.corpus.documents(chunk)):
            expected.update([*tokenizer.encode(document.text).tolist(), *[tokenizer.eos_id] * document.ends])
        held_out = sum(1 for _ in source.corpus.held_out())
        assert held_out
    assert found == Counter({token: 2 * count for token, count in expected.items()})


def test_each_process_tokenizes_its_share_of_the_text(corpus, tokenizer, monkeypatch):
    mixture, config = opened(corpus)
    encoded: Counter[str] = Counter()
    original = Tokenizer.encode_all

    def counting(self, texts):
        return original(self, (encoded.update(characters=len(text)) or text for text in texts))

    monkeypatch.setattr(Tokenizer, "encode_all", counting)
    sizes = []
    for process in range(4):
        encoded.clear()
        loader = Loader(mixture, tokenizer, config, 0, [], Share(process, 4))  # type: ignore[arg-type]
        for step in range(40):
            loader._read(step, 16)
        sizes.append(encoded["characters"])
    assert max(sizes) < 1.6 * sum(sizes) / 4
