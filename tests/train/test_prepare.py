"""Recognizes the folder of a run, even of one that was killed as it began."""

import json
from pathlib import Path

import pytest

import train.prepare
from data.errors import InputError
from data.mixture import open_mixture
from train.config.reading import make_config
from train.prepare import is_claimed, train_run_tokenizer
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


def test_the_tokenizer_learns_from_each_corpus_by_its_first_weight(tmp_path: Path, monkeypatch):
    corpora = {}
    for letter, weight in (("a", [[0, 3], [9, 1]]), ("b", 1), ("c", [[0, 0], [5, 1]])):
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{i} {letter * 80}"}) + "\n" for i in range(400)))
        corpora[letter] = {"corpus": str(path), "weight": weight}
    sizes: dict[str, int] = {}

    def train_tokenizer(sample: list[str], *_: object) -> None:
        for text in sample:
            sizes[text[-1]] = sizes.get(text[-1], 0) + len(text)

    monkeypatch.setattr(train.prepare, "train_tokenizer", train_tokenizer)
    config = make_config({"data": {"corpus": corpora, "num_streams": 2}, "tokenizer": {"sample_bytes": 8000}})
    train_run_tokenizer(config, open_mixture(config.resolved().data, lambda: ""), tmp_path)
    wanted = {"a": 4800, "b": 1600, "c": 1600}
    assert sizes == {name: pytest.approx(size, abs=1) for name, size in wanted.items()}
