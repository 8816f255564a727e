"""The data of a run as its user meets it: where a batch is from, changes on resume, mixtures, epochs, bad documents."""

import itertools
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.corpus import open_corpus
from data.tokenizer.folder import load_tokenizer
from tests.launch.small_run import here, metrics, write_config, write_corpus, ziggurat
from train.checkpoint.checkpoint import Checkpoints
from train.run.folder import Run


def shown(capsys: pytest.CaptureFixture, *arguments: object) -> dict:
    assert here("inspect", "data", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def positions(run: Path) -> list[dict]:
    return [json.loads(line) for line in Run(run).positions.read_text().splitlines()]


def test_inspect_data_shows_the_documents_of_a_step_as_they_stand_in_the_corpus(finished: Path, capsys):
    corpus = (finished.parent / "corpus.jsonl").read_bytes()
    tokenizer, T = load_tokenizer(finished / "tokenizer"), 32
    for step in (1, 7, 12):
        rows = shown(capsys, finished, f"--step={step}")["rows"]
        assert [row["row"] for row in rows] == list(range(8))
        trained = 0
        for part in (part for row in rows for part in row["parts"]):
            assert part["file"] == str(finished.parent / "corpus.jsonl")
            text = json.loads(corpus[part["byte"] :].splitlines()[0])["text"]
            first, last = part["characters"]
            assert part["text"] == text[first:last]
            assert len(tokenizer.encode(part["text"])) + part["end"] >= part["tokens"] - 1
            trained += part["tokens"]
        assert trained == 8 * T == metrics(finished)[step - 1]["loss_weight"]
    assert shown(capsys, finished, "--step=7", "--row=3")["rows"] == shown(capsys, finished, "--step=7")["rows"][3:4]
    # The same of a run that the config would start.
    assert shown(capsys, f"--config={finished.parent / 'run.py'}", "--step=12")["rows"] == rows


def test_inspect_data_begins_at_the_position_logged_before(finished: Path, tmp_path: Path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    logged = positions(run)
    assert [record["step"] for record in logged] == [0, 4, 8, 12]
    expected = shown(capsys, run, "--step=12")
    taken = []
    from data.mixture import MixedStream

    original = MixedStream.take
    monkeypatch.setattr(MixedStream, "take", lambda self, step: taken.append(step) or original(self, step))
    assert shown(capsys, run, "--step=12") == expected
    assert Counter(taken) == dict.fromkeys((8, 9, 10, 11), 8)
    Run(run).positions.unlink()
    assert shown(capsys, run, "--step=12") == expected


def test_inspect_data_prints_text_and_a_summary(finished: Path, capsys):
    assert here("inspect", "data", finished, "--step=2", "--row=0") == 0
    text = capsys.readouterr().out
    assert re.match(r"step 2\nrow 0\n  \S+corpus\.jsonl, byte \d+, characters \d+ to \d+: \d+ tokens", text)
    assert here("inspect", "data", f"{finished}@2", "--row=0") == 0
    assert capsys.readouterr().out == text
    [summary] = shown(capsys, finished, "--summary")["corpora"]
    lines = (finished.parent / "corpus.jsonl").read_text().splitlines()
    assert summary["documents"] == pytest.approx(0.9 * len(lines), rel=0.1)
    assert summary["utilization"] == pytest.approx(1, abs=1e-3)
    assert summary["epochs"] == pytest.approx(12 * 8 * 32 / summary["tokens"], rel=1e-2)
    assert here("inspect", "data", finished, "--summary") == 0
    assert "bytes a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}"], "give --step=N or --summary"),
        (["{run}", "--step=13"], "the run has steps 1 to 12"),
        (["{run}", "--step=1", "--row=8"], "the batch has rows 0 to 7"),
        (["--step=1"], "give a RUN or --config"),
        (["{run}", "--config=tiny", "--step=1"], "give a RUN or --config"),
        (["{run}", "--config.data.epochs=2", "--step=1"], "a RUN has its own config"),
        (["{run}/none", "--step=1"], "there is no such folder"),
    ],
)
def test_inspect_data_says_what_is_wrong(finished: Path, capsys, arguments, words):
    assert here("inspect", "data", *(argument.format(run=finished) for argument in arguments)) == 2
    assert words in capsys.readouterr().err


def test_a_changed_corpus_or_data_setting_is_refused_or_begins_a_new_epoch(
    finished: Path, tmp_path: Path, capsys, caplog
):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path)
    config = write_config(tmp_path)
    again = ["pretrain", f"--config={config}", "--config.train.num_steps=16"]
    with (tmp_path / "corpus.jsonl").open("a") as corpus:
        corpus.write(json.dumps({"text": "one more document"}) + "\n")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert here(*again) == 2
    error = capsys.readouterr().err
    assert re.search(r"data\.corpus  \w{12}  \w{12}\n", error)
    assert "--config.data.accept_changes=true" in error
    assert here(*again, "--config.data.segmentation=pack") == 2
    assert "data.segmentation  concatenate  pack\n" in capsys.readouterr().err
    once = ["--config.data.epochs=1", "--config.data.accept_changes=true", "--config.data.validation_fraction=0.2"]
    assert here(*again, *once) == 2
    assert "data.corpus: 1 epochs have been read before the change" in capsys.readouterr().err
    assert here(*again, "--config.data.segmentation=pack", "--config.train.seed=1",
                "--config.data.accept_changes=true") == 2  # fmt: skip
    assert "train.seed  0       1\n" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    accepted = [*again, "--config.data.segmentation=pack", "--config.data.accept_changes=true",
                "--config.data.validation_fraction=0.2"]  # fmt: skip
    assert here(*accepted) == 0
    assert "the streams start over with epoch 1" in caplog.text
    # What is evaluated now is held out of the new data.
    kept = [text.text for text in Run(tmp_path / "run").held_out_texts()]
    assert kept != [text.text for text in Run(finished).held_out_texts()]
    corpus = open_corpus(str(tmp_path / "corpus.jsonl"), Run(tmp_path / "run").load_config().data)
    *whole, cut = itertools.islice((document.text for document in corpus.held_out()), len(kept))
    assert kept[:-1] == whole
    assert cut.startswith(kept[-1])
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 17))
    assert metrics(tmp_path / "run")[-1]["utilization"] < 1
    first, *_, last = positions(tmp_path / "run")[3:]
    assert first["step"] == 12
    assert np.array(first["positions"])[:, :, 0].tolist() == [[1]] * 8
    assert last["step"] == 16
    # What was read before the change can no longer be shown, what was read after it can.
    capsys.readouterr()
    assert here("inspect", "data", tmp_path / "run", "--step=3") == 2
    assert "is not what its corpus, tokenizer and data settings are now" in capsys.readouterr().err
    assert shown(capsys, tmp_path / "run", "--step=14")["rows"]


def test_the_weights_of_a_mixture_may_change_without_a_new_epoch(tmp_path: Path, caplog, capsys):
    mixture = {name: {"corpus": str(write_corpus(tmp_path / f"{name}.jsonl")), "weight": 1} for name in "ab"}
    write_corpus(tmp_path / "corpus.jsonl")
    config = write_config(tmp_path)
    common = ["pretrain", f"--config={config}", "--config.checkpoint.export=false",
              "--config.evaluation.sample_tokens=0"]  # fmt: skip
    assert here(*common, f"--config.data.corpus={json.dumps(mixture)}", "--config.train.num_steps=4") == 0
    last = metrics(tmp_path / "run")[-1]
    assert last["validation_by_corpus"].keys() == {"a", "b"}
    error = capsys.readouterr().err
    assert "corpus['a']: a.jsonl" in error
    assert "50.0% of the rows" in error
    assert here("evaluate", tmp_path / "run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    expected = last["held_out_by_corpus"]["b"]["held_out_bits_per_byte"]
    assert found["by_corpus"]["b"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert here("evaluate", tmp_path / "run") == 0
    assert "\ncorpus b\n  loss " in capsys.readouterr().out
    mixture["b"]["weight"] = 3
    heavier = [*common, f"--config.data.corpus={json.dumps(mixture)}", "--config.train.num_steps=12"]
    assert here(*heavier) == 2
    assert "data.corpus['b'].weight  [[0, 1.0]]  [[0, 3.0]]\n" in capsys.readouterr().err
    assert here(*heavier, "--config.data.accept_changes=true") == 0
    assert "start over" not in caplog.text
    capsys.readouterr()
    rows = [row for step in range(5, 13) for row in shown(capsys, tmp_path / "run", f"--step={step}")["rows"]]
    assert abs(Counter(row["corpus"] for row in rows)["b"] - 48) <= 8


def test_a_run_ends_with_its_epochs_and_stays_finished(finished: Path, tmp_path: Path, capsys):
    config = write_config(tmp_path)
    small = tmp_path / "small.jsonl"
    small.write_text("".join((tmp_path / "corpus.jsonl").open().readlines()[:90]))
    command = ["pretrain", f"--config={config}", f"--config.data.corpus={small}", "--config.data.epochs=2",
               "--config.train.num_steps=1000", f"--config.tokenizer.path={finished / 'tokenizer'}"]  # fmt: skip
    assert here(*command) == 0
    printed = capsys.readouterr()
    closing = printed.out
    records = metrics(tmp_path / "run")
    assert len(records) < 200
    (warning,) = re.findall(r"data.epochs end the run near step (\d+) of 1,000, before its learning rate", printed.err)
    # The streams of so small a corpus end far apart, and the run with the last of them.
    assert 0.5 < int(warning) / len(records) < 1.1
    assert f"--config.train.num_steps={len(records)} lets it fall" in closing
    # No more time is left than the steps of its epochs take.
    assert re.findall(r"^step \d+/1000 .* ETA (.*)$", printed.err, re.M)[-1] in ("0 s", "1 s", "2 s")
    assert f"is finished: {len(records)} steps of 1000, where its corpus ended" in closing
    assert "validation_loss" in records[-1]
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    held_out = {text.text for text in Run(tmp_path / "run").held_out_texts()}
    texts = [json.loads(line)["text"] for line in small.open()]
    trained = sum(len(tokenizer.encode(text)) + 1 for text in texts if text not in held_out)
    assert sum(record["loss_weight"] for record in records) == 2 * trained
    assert here(*command) == 0
    assert metrics(tmp_path / "run") == records
    capsys.readouterr()
    assert any(row["parts"] for row in shown(capsys, tmp_path / "run", f"--step={len(records)}")["rows"])
    far = ["--config.train.num_steps=1000000000", "--step=1000000000"]
    for arguments in ([tmp_path / "run", f"--step={len(records) + 1}"], [*command[1:], *far]):
        assert here("inspect", "data", *arguments) == 2
        assert "the run ends before it, with the last epoch" in capsys.readouterr().err


def test_a_bad_document_ends_the_run_with_its_checkpoint_or_is_left_out(tmp_path: Path, capsys, caplog):
    config = write_config(tmp_path)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines(keepends=True)
    run = tmp_path / "run"
    # Too large to be looked through before, as far as this run knows.
    command = ["pretrain", f"--config={config}", "--config.checkpoint.export=false",
               "--config.evaluation.sample_tokens=0"]  # fmt: skip
    lines[100] = "{broken}\n"
    lines[200] = '{"body": "no text"}\n'
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    assert here(*command) == 2
    error = capsys.readouterr().err
    assert "corpus.jsonl:101: " in error
    assert "data.on_bad_document=skip" in error
    assert here(*command, "--config.data.on_bad_document=skip") == 0
    assert "corpus.jsonl:101: " in caplog.text
    assert "corpus.jsonl:201: " in caplog.text
    assert caplog.text.count(":101: ") == 1
    assert "2 documents could not be read and were skipped" in capsys.readouterr().err
    expected = [record["loss"] for record in metrics(run)]
    shutil.rmtree(run)
    assert here(*command, "--config.data.on_bad_document=skip", "--config.data.num_workers=2") == 0
    assert [record["loss"] for record in metrics(run)] == expected


def test_a_file_that_changes_while_the_run_reads_it_ends_it_with_its_checkpoint(tmp_path: Path, monkeypatch, capsys):
    config = write_config(tmp_path)
    original = Checkpoints.save

    def save(self, state, progress):
        original(self, state, progress)
        (tmp_path / "corpus.jsonl").write_text("")

    monkeypatch.setattr(Checkpoints, "save", save)
    # Windows of a few documents, so that there is something to read after the first checkpoint.
    command = ["pretrain", f"--config={config}", "--config.data.shuffle_window=1000", "--config.data.chunk_bytes=2000"]
    # A new start says what has changed, or goes on.
    assert here(*command) == 1
    assert "corpus.jsonl" in (error := capsys.readouterr().err)
    assert "has changed since the run listed it" in error
    assert "Traceback" not in error
    assert Run(tmp_path / "run").last_step() == 4


def test_any_name_of_a_corpus_file_is_shown(tmp_path: Path, finished: Path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    content = (finished.parent / "corpus.jsonl").read_bytes()
    Path(os.fsdecode(bytes(folder) + b"/\xff\x1b[31m.jsonl")).write_bytes(content)
    config = f"--config={finished.parent / 'run.py'}"
    for more in (["--step=1"], ["--summary"]):
        done = ziggurat("inspect", "data", config, f"--config.data.corpus={folder}", *more)
        assert done.returncode == 0, done.stderr
        assert r"\udcff\x1b[31m.jsonl" in done.stdout


def test_a_corpus_whose_weight_rises_from_0_is_in_the_tokenizer_sample(tmp_path: Path):
    for name, word in (("a", "abcabc"), ("b", "xyzxyz")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": f"{word} " * 20}) + "\n") * 200)
    mixture = {
        "a": {"corpus": str(tmp_path / "a.jsonl")},
        "b": {"corpus": str(tmp_path / "b.jsonl"), "weight": [[0, 0], [9, 2]]},
    }
    config = write_config(tmp_path)
    to = tmp_path / "tokenizer"
    assert here("tokenize", f"--config={config}", f"--config.data.corpus={json.dumps(mixture)}", f"--to={to}") == 0
    assert len(load_tokenizer(to).encode("xyzxyz")) == len(load_tokenizer(to).encode("abcabc")) == 1
