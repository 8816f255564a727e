"""`ziggurat merge`: the average of checkpoints is a run, whole or not there at all (C8, C9)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from model.trees import flattened
from tests.benchmarks import merge as benchmark
from tests.launch.small_run import here, metrics, write_config
from train.checkpoint.checkpoint_reader import CheckpointReader
from train.devices.mesh import one_device_mesh
from train.run.events import read_events
from train.run.folder import Run
from train.weights.load import load_trained

QUICK = ["--config.checkpoint.export=false", "--config.data.validation_fraction=0"]


def weights_of(run: Path | str) -> dict[str, np.ndarray]:
    with jax.set_mesh(one_device_mesh()):
        return flattened(jax.device_get(load_trained(str(run)).weights))


def average(runs: list[str], shares: list[float]) -> dict[str, np.ndarray]:
    parts, whole = [weights_of(run) for run in runs], sum(shares)
    wide = {name: [part[name].astype(np.float64) for part in parts] for name in parts[0]}
    weighted = {name: sum(s * x for s, x in zip(shares, arrays, strict=True)) for name, arrays in wide.items()}
    return {name: (array / whole).astype(np.float32) for name, array in weighted.items()}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert one[name].dtype == np.float32


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at a constant rate, of 9 steps, with checkpoints of steps 3, 6 and 9, which have averages, too."""
    folder = tmp_path_factory.mktemp("constant")
    flags = ["--config.optimizer.schedule=wsd", "--config.optimizer.decay_fraction=0", "--config.train.num_steps=9",
             "--config.optimizer.warmup_steps=2", "--config.checkpoint.every_steps=3", "--config.checkpoint.keep=9",
             "--config.train.ema_decay=0.5"]  # fmt: skip
    assert here("pretrain", f"--config={write_config(folder)}", *QUICK, *flags) == 0
    return folder / "run"


@pytest.mark.parametrize(("flags", "weights"), [([], [1, 1]), (["--weights=3,1"], [3, 1]), (["--weights=0,2"], [0, 2])])
def test_the_average_is_the_sum_that_the_weights_say(finished: Path, tmp_path: Path, flags, weights, capsys):
    names = [f"{finished}@8", f"{finished}@12"]
    assert here("merge", *names, f"--to={tmp_path / 'run'}", *flags) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert_equal(weights_of(tmp_path / "run"), average(names, weights))
    [event] = read_events(tmp_path / "run" / "events.jsonl")
    assert event["scheme"] == ("given weights" if flags else "equal weights")
    origins = [(origin["run"], origin["step"], origin["weight"]) for origin in event["of"]]
    assert origins == [
        (str(finished.resolve()), step, w / sum(weights)) for step, w in zip((8, 12), weights, strict=True)
    ]


def test_the_order_of_the_checkpoints_makes_no_difference(constant: Path, tmp_path: Path):
    names = [f"{constant}@{step}" for step in (3, 6, 9)]
    for i, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        given = ",".join(str([1, 2, 5][k]) for k in order)
        assert here("merge", *(names[k] for k in order), f"--weights={given}", f"--to={tmp_path / str(i)}") == 0
        assert_equal(weights_of(tmp_path / str(i)), weights_of(tmp_path / "0"))


def test_an_average_is_of_the_weights_that_are_evaluated_and_a_decay_of_the_trained_ones(constant, tmp_path, caplog):
    names = [f"{constant}@{step}" for step in (3, 6, 9)]
    assert here("merge", *names, f"--to={tmp_path / 'equal'}") == 0
    assert_equal(weights_of(tmp_path / "equal"), average(names, [1, 1, 1]))
    assert here("merge", *names, f"--to={tmp_path / 'decay'}", "--decay") == 0
    trained = shutil.copytree(constant, tmp_path / "trained")
    for step in (3, 6, 9):  # Without the averages, RUN@STEP is the trained weights.
        progress = trained / "checkpoints" / str(step) / "progress" / "metadata"
        values = json.loads(progress.read_text())
        del values["checksums"]["average"], values["digest"]
        progress.write_text(json.dumps(values))
    expected = average([f"{trained}@{step}" for step in (3, 6, 9)], [4, 6, 2])
    assert_equal(weights_of(tmp_path / "decay"), expected)
    averaged = [
        [o["average"] for o in read_events(tmp_path / name / "events.jsonl")[0]["of"]] for name in ("equal", "decay")
    ]
    assert averaged == [[True] * 3, [False] * 3]
    assert "is not constant" not in caplog.text


def test_a_merged_run_is_evaluated_exported_and_gone_on_from(finished: Path, tmp_path: Path, capsys):
    run, export = tmp_path / "run", tmp_path / "weights"
    assert here("merge", f"{finished}@8", finished, f"--to={run}") == 0
    figures = []
    for model in (run, f"{run}@0"):
        capsys.readouterr()
        assert here("evaluate", model, "--json") == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1]
    assert figures[0]["documents"] == len(Run(finished).held_out_texts()) > 0
    assert here("generate", run, "--prompt=the cat", "--greedy", "--max_new_tokens=4") == 0
    assert here("export", run, "--format=hf", f"--to={export}") == 0
    card = (export / "README.md").read_text()
    assert "| average of | run@8 × 0.5, run@12 × 0.5 |" in card
    assert "| weights of the average | equal weights |" in card
    assert weights_of(export).keys() == weights_of(run).keys()

    # A run that starts from it has the settings, and so the corpus, of the first one.
    fork = tmp_path / "fork"
    assert here("pretrain", f"--config={run}@0", f"--config.train.run_dir={fork}", "--config.train.num_steps=2", *QUICK,
                "--config.optimizer.learning_rate=0") == 0  # fmt: skip
    assert len(metrics(fork)) == 2
    assert_equal(weights_of(f"{fork}@2"), weights_of(run))
    for flags, words in (
        (["pretrain", f"--config={run}"], "holds weights alone, from which another run can start"),
        (["report", run], "holds weights alone, which have no steps and no data"),
    ):
        capsys.readouterr()
        assert here(*flags) == 2
        assert words in capsys.readouterr().err


def test_a_decay_of_a_rate_that_changes_is_said(finished: Path, tmp_path: Path, caplog):
    assert here("merge", f"{finished}@8", f"{finished}@12", "--decay", f"--to={tmp_path / 'run'}") == 0
    assert "is not constant from step 8 to 12: it goes from" in caplog.text


def test_the_average_of_a_constant_rate_is_better_than_its_last_step(tmp_path: Path, monkeypatch, capsys):
    """A short relative of `python -m tests.benchmarks.merge`."""

    def in_this_process(*words: object) -> str:
        capsys.readouterr()
        assert here(*words) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(benchmark, "ziggurat", in_this_process)
    # Words that nothing predicts: what a high rate costs is soon all that is left to learn.
    chance, words = np.random.default_rng(0), np.array(["one", "two", "three", "four", "five", "six", "seven", "eight"])
    corpus = tmp_path / "corpus.jsonl"
    texts = (" ".join(words[chance.integers(8, size=40)]) for _ in range(700))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [f"--config={write_config(tmp_path)}", "--config.train.num_steps=60", "--config.evaluation.every_steps=60",
             "--config.optimizer.learning_rate=5e-2", "--config.evaluation.sample_tokens=0"]  # fmt: skip
    bits = benchmark.measure(tmp_path, flags, steps=60, every=4, spans=[20])
    assert bits["its own decay"] < bits["constant rate"]
    for how in ("equal weights", "--decay"):
        assert bits[f"merged, {how}, last 20 steps"] < bits["constant rate"]


def test_one_parameter_of_all_checkpoints_is_read_before_the_next(constant: Path, tmp_path: Path, monkeypatch):
    read = []
    original = CheckpointReader.__call__

    def noting(self: CheckpointReader, name: str, layer: int | None) -> np.ndarray:
        read.append((name, layer))
        return original(self, name, layer)

    monkeypatch.setattr(CheckpointReader, "__call__", noting)
    assert here("merge", *(f"{constant}@{step}" for step in (3, 6, 9)), f"--to={tmp_path / 'run'}") == 0
    assert read[::3] == read[1::3] == read[2::3]
    assert len(set(read)) == len(read) / 3 > 10


def test_everything_wrong_is_said_at_once_and_nothing_is_written(finished, constant, tmp_path: Path, capsys):
    folder = tmp_path / "others"
    folder.mkdir()
    start = ["pretrain", f"--config={write_config(folder)}", *QUICK, "--config.train.num_steps=1"]
    assert here(*start, "--config.model.num_layers=1", "--config.tokenizer.vocab_size=480") == 0
    to, one = tmp_path / "run", f"{finished}@12"
    cases = [
        ([one, f"{folder / 'run'}@1"], ["model.num_layers is 1, and 2 in", "its tokenizer is not that of"]),
        ([one, f"{finished}@7", "nowhere@3"], ["has no checkpoint of step 7", "nowhere: there is no"]),
        ([one], ["give two checkpoints or more"]),
        ([one, finished], [f"{finished} is {one}; name each checkpoint once"]),
        ([one, f"{finished}@x"], ["after @ comes the step of a checkpoint"]),
        ([one, finished / "export"], ["holds exported weights; make a run of them with `ziggurat import`"]),
        ([one, f"{finished}@8", "--weights=1"], ["--weights has 1 numbers for 2 checkpoints"]),
        ([one, f"{finished}@8", "--weights=1,-1"], ["--weights must be numbers at or above 0"]),
        ([one, f"{finished}@8", "--weights=0,0"], ["--weights must be numbers at or above 0"]),
        ([one, f"{finished}@8", "--weights=nan,1"], ["--weights must be numbers at or above 0"]),
        ([one, f"{finished}@8", "--weights=1,a"], ["--weights=1,a: give numbers with commas"]),
        ([one, f"{finished}@8", "--weights=1,1", "--decay"], ["not allowed with argument --weights"]),
        ([one, f"{finished}@8", "--decay"], ["in the order of their steps; they are [12, 8]"]),
        ([one, f"{constant}@9", "--decay"], ["--decay takes the checkpoints of one run"]),
    ]  # fmt: skip
    before = sorted(tmp_path.iterdir())
    for words, expected in cases:
        capsys.readouterr()
        assert here("merge", *words, f"--to={to}") == 2, words
        error = capsys.readouterr().err
        assert all(text in error for text in expected), error
        assert "Traceback" not in error
        assert sorted(tmp_path.iterdir()) == before
    assert here("merge", one, f"{finished}@8", f"--to={constant}") == 2
    assert "is there already; name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["weights", "progress"])
def test_a_damaged_checkpoint_leaves_nothing(constant: Path, tmp_path: Path, place: str, capsys):
    damaged = shutil.copytree(constant, tmp_path / "damaged")
    if place == "progress":
        file = damaged / "checkpoints" / "6" / "progress" / "metadata"
        file.write_text(file.read_text().replace('"weights"', '"weight5"', 1))
        words = "holds no checkpoint that can be read"
    else:
        files = [file for file in (damaged / "checkpoints" / "6" / "average").rglob("*") if file.is_file()]
        largest = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content)
        words = "is damaged ("
    assert here("merge", f"{constant}@3", f"{damaged}@6", f"--to={tmp_path / 'run'}") == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]
