"""Mistakes of users: a clear line, status 2, no traceback, nothing overwritten (C9)."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.tokenizer.training import train_tokenizer
from launch.exit_status import report_error
from tests.launch.small_run import ROOT, here, write_config

LONG = "n" * 300
# (what it is, the command, words of the message). In commands and words, {run} is a finished run's folder, {dir} an
# empty one, {config} a good config file.
TABLE = [
    ("no such command", ["pretrian"], "pretrian: there is no such command; did you mean pretrain?"),
    ("no such preset", ["pretrain", "--config=tinny"], "vaswani_base; did you mean tiny?"),
    ("no such config file", ["pretrain", "--config={dir}/none.py"], "there is no such file"),
    ("unknown field", ["pretrain", "--config=tiny", "--config.model.layers=2"], "model.layers: there is no such field"),
    ("unknown group", ["pretrain", "--config=tiny", "--config.modle.num_layers=2"], "did you mean model.num_layers?"),
    ("wrong type", ["pretrain", "--config=tiny", "--config.train.num_steps=many"], "it must be a whole number"),
    ("heads that do not fit", ["pretrain", "--config=tiny", "--config.model.num_kv_heads=2"], "does not divide"),
    ("streams that do not fit", ["pretrain", "--config=tiny", "--config.data.num_streams=7"], "nearest that does: 8"),
    ("unknown flag", ["pretrain", "--config=tiny", "--steps=3"], "--steps=3: there is no such flag"),
    ("mesh that does not fit", ["pretrain", "--config={config}", "--config.mesh.data=3"], "does not fit 8 devices"),
    ("batch that cannot be shared", ["pretrain", "--config={config}", "--config.train.batch_size=12"],
     "train.batch_size / train.accumulation_steps = 12 cannot be shared by mesh.fsdp = 8"),
    ("no corpus named", ["pretrain", "--config=small"], "data.corpus is not given; name it with --config.data.corpus="),
    ("a value that is no value", ["pretrain", "--config=tiny", "--config.train.num_steps=--"],
     "train.num_steps is '--'; it must be a whole number"),
    ("no corpus", ["pretrain", "--config={config}", "--config.data.corpus={dir}/none.txt"], "no such file or folder"),
    ("corpus of another kind", ["pretrain", "--config={config}", "--config.data.corpus={dir}/a.csv"], "no .txt"),
    ("damaged corpus", ["pretrain", "--config={config}", "--config.data.corpus={dir}/bad.jsonl"], "bad.jsonl:2: "),
    ("corpus too short", ["pretrain", "--config={config}", "--config.data.corpus={dir}/short.txt"], "give more text"),
    ("one file that is too short for its streams", ["pretrain", "--config={config}",
     "--config.data.corpus={dir}/one.jsonl.gz"], "1 documents or pieces to train on, too few for data.num_streams = 8"),
    ("mixture that is no JSON", ["pretrain", "--config=tiny", "--config.data.corpus={{web"], "JSON where it begins"),
    ("mixture with an unknown field", ["pretrain", "--config=tiny",
     '--config.data.corpus={{"a": {{"corpus": "stdlib", "wieght": 2}}}}'],
     "data.corpus['a']: unknown field 'wieght'"),
    ("mixture with corpora that are not there", ["pretrain", "--config={config}",
     '--config.data.corpus={{"a": {{"corpus": "{dir}/none"}}}}'], "data.corpus['a'] = "),
    ("no such segmentation", ["pretrain", "--config=tiny", "--config.data.segmentation=packed"],
     "data.segmentation is 'packed'; it must be one of concatenate, pack"),
    ("no such way with bad documents", ["pretrain", "--config=tiny", "--config.data.on_bad_document=drop"],
     "data.on_bad_document is 'drop'; it must be one of error, skip"),
    ("corpus behind an unknown protocol", ["pretrain", "--config={config}", "--config.data.corpus=nowhere://a/b"],
     "s3://, gs://, hf:// and https://"),
    ("other field of the text", ["pretrain", "--config={config}", "--config.data.text_field=body"], "no field 'body'"),
    ("no tokenizer", ["pretrain", "--config={config}", "--config.tokenizer.path={dir}"], "holds no tokenizer"),
    ("vocabulary below the tokenizer's", ["pretrain", "--config={config}", "--config.model.vocab_size=100"],
     "model.vocab_size = 100 is less than the tokenizer's"),
    ("vocabulary below that of a given tokenizer", ["pretrain", "--config={config}", "--config.model.vocab_size=280",
     "--config.tokenizer.path={other_tokenizer}"], "model.vocab_size = 280 is less than the tokenizer's"),
    ("vocabulary below that of the default corpus's tokenizer", ["pretrain", "--config={config}",
     "--config.data.corpus=stdlib", "--config.tokenizer.sample_bytes=20000", "--config.model.vocab_size=100"],
     "model.vocab_size = 100 is less than the tokenizer's"),
    ("default corpus beside one that is not there", ["pretrain", "--config={config}",
     '--config.data.corpus={{"a": {{"corpus": "stdlib"}}, "b": {{"corpus": "{dir}/none"}}}}'],
     "data.corpus['b'] = "),
    ("a path that a library takes for a pattern", ["pretrain", "--config={config}",
     "--config.train.run_dir={dir}/[x]/run"], "checkpoints cannot be kept at a path with ["),
    ("checkpoints at such a path", ["pretrain", "--config={config}", "--config.checkpoint.dir={dir}/a*"],
     "checkpoints cannot be kept at a path with *"),
    ("another folder", ["pretrain", "--config={config}", "--config.train.run_dir={dir}"],
     "folder holds other things than a run"),
    ("folder under a file", ["pretrain", "--config={config}", "--config.train.run_dir={dir}/a.csv/run"], "is a file"),
    ("export under a file", ["export", "{run}", "--format=hf", "--to={dir}/a.csv/x"], "a.csv"),
    ("empty corpus to evaluate on", ["evaluate", "{run}", "--corpus={dir}/empty.jsonl"], "no text"),
    ("config.json lost", ["pretrain", "--config={config}", "--config.train.run_dir={lost}"], "but no config.json"),
    ("frozen field on resume", ["pretrain", "--config={run_config}", "--config.model.num_layers=3"],
     "field             before  now\n  model.num_layers  2       3\n"),
    ("fewer steps on resume", ["pretrain", "--config={run_config}", "--config.train.num_steps=3"],
     "has done 12 steps already"),
    ("other tokenizer on resume", ["pretrain", "--config={run_config}", "--config.tokenizer.path={other_tokenizer}"],
     "is not the tokenizer that the run in"),
    ("a folder with a config.json of another program", ["pretrain", "--config={config}",
     "--config.train.run_dir={foreign}"], "is not the config of a run"),
    ("export onto another project", ["export", "{run}", "--format=hf", "--to={foreign}"], "holds other things"),
    ("weights lost", ["generate", "{foreign}", "--prompt=a"], "has no model.safetensors"),
    ("other corpus on resume", ["pretrain", "--config={run_config}", "--config.data.corpus={dir}/other.jsonl"],
     "data.accept_changes=true"),
    ("tokenizer exists", ["tokenize", "--config={config}", "--to={dir}"], "is there already; name a new folder"),
    ("no run", ["evaluate", "{dir}/none"], "there is no such folder"),
    ("no run but a folder", ["generate", "{dir}", "--prompt=a"], "has no config.json: it is neither a run nor"),
    ("no such step", ["evaluate", "{run}@7"], "no checkpoint of step 7; there are [8, 12]"),
    ("no such step to generate from", ["generate", "{run}@7", "--prompt=a"], "no checkpoint of step 7; there are"),
    ("no such step to export", ["export", "{run}@7", "--format=hf", "--to={dir}/new"], "no checkpoint of step 7"),
    ("no such step to look at", ["inspect", "loss", "{run}@7", "--prompt=a"], "no checkpoint of step 7; there are"),
    ("two steps to look at", ["inspect", "data", "{run}@7", "--step=8"], "give --step=8 or "),
    ("settings of no step", ["pretrain", "--config={run}@newest"], "after @ comes the step of a checkpoint"),
    ("settings of what is no run", ["pretrain", "--config={dir}"], "has no config.json"),
    ("steps between those that stay", ["pretrain", "--config={config}", "--config.checkpoint.keep_every_steps=6"],
     "checkpoint.keep_every_steps = 6 is not a multiple of checkpoint.every_steps = 4, so little would stay; give 8"),
    ("no step at all", ["evaluate", "{run}@last"], "after @ comes the step of a checkpoint"),
    ("step of weights", ["evaluate", "{run}/export@8"], "exported weights have no steps"),
    ("weights without a corpus", ["evaluate", "{run}/export"], "give --corpus=PATH"),
    ("corpus to evaluate on", ["evaluate", "{run}", "--corpus={dir}/none"], "--corpus = /"),
    ("sampling flags", ["generate", "{run}", "--prompt=a", "--top_k=-1", "--temperature=0", "--max_new_tokens=0"],
     "--max_new_tokens=0 must be from 1 to"),
    ("greedy and sampling", ["generate", "{run}", "--prompt=a", "--greedy", "--seed=1"], "--seed has no effect"),
    ("export of a step of weights", ["export", "{run}/export@8", "--format=hf", "--to={dir}/new"], "have no steps"),
    ("export onto something", ["export", "{run}", "--format=hf", "--to={dir}"], "holds other things than an export"),
    ("text of more than a segment", ["inspect", "loss", "{run}", "--prompt=" + 99 * "cat "], "the model sees 32"),
    ("no text to inspect", ["inspect", "loss", "{run}", "--prompt="], "--prompt: empty; give some text"),
    ("table of positions too short", ["pretrain", "--config={config}", "--config.model.position=learned",
     "--config.model.max_positions=31"], "max_positions = 31 is less than data.segment_length = 32"),
    ("floors that are none", ["pretrain", "--config={config}", "--config.model.norm=batchnorm"], "rmsnorm, layernorm"),
    ("no processes", ["launch", "local", "--processes=0", "--", "pretrain"], "--processes=0 must be at least 1"),
    ("over-long config", ["pretrain", f"--config={LONG}.py"], LONG),
    ("over-long run folder", ["pretrain", "--config={config}", f"--config.train.run_dir={{dir}}/{LONG}"], LONG),
    ("over-long run", ["generate", f"{{dir}}/{LONG}", "--prompt=a"], LONG),
    ("over-long export", ["export", "{run}", "--format=hf", f"--to={{dir}}/{LONG}"], LONG),
    ("over-long tokenizer", ["tokenize", "--config={config}", f"--to={{dir}}/{LONG}"], LONG),
    ("tokenizer to make and given", ["tokenize", "--config={config}", "--config.tokenizer.path={dir}", "--to={dir}/t"],
     "tokenizer.path = "),
    ("a flag whose value is --", ["generate", "{run}", "--prompt=a", "--top_k=--"],
     "--top_k: invalid int value: '--'"),
    ("a number for what is JSON", ["pretrain", "--config=tiny", "--config.recovery.skips=-1"],
     "recovery.skips is '-1'"),
    ("no experiment", ["compare", "{dir}/none.toml"], "none.toml: there is no such file; give an experiment"),
    ("an experiment of another kind", ["compare", "{dir}/a.csv"], "a.csv:1: no TOML: "),
    ("a run twice in a page", ["report", "{run}", "{run}/.", "--output={dir}/page.html"], "is named twice"),
    ("a page of runs of which one is none", ["report", "{run}", "{dir}", "--output={dir}/page.html"], "no config.json"),
    ("a ladder of a model without sizes below it", ["ladder", "--config={config}", "--to={dir}/new"],
     "shrinks to no 5 sizes"),
    ("nothing to launch", ["launch", "local", "--processes=2"], "there is no command; give one after --"),
]  # fmt: skip


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some other words"], 400, folder)
    return folder


@pytest.fixture
def places(tmp_path: Path, finished: Path, other_tokenizer: Path) -> dict[str, str]:
    """The paths that stand for {run}, {dir} and the configs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("1,2")
    (folder / "short.txt").write_text("a few words")
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    line = json.dumps({"text": "some words " * 50}) + "\n"
    (folder / "one.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (folder / "bad.jsonl").write_text(line + "{oops\n" + line * 20)
    (folder / "other.jsonl").write_text(line * 200)
    copy = tmp_path / "copy" / "run"
    shutil.copytree(finished, copy)
    run_config = write_config(tmp_path / "copy")
    shutil.copy(finished.parent / "corpus.jsonl", tmp_path / "copy" / "corpus.jsonl")
    shutil.copytree(finished / "checkpoints", tmp_path / "lost" / "checkpoints")
    foreign = tmp_path / "foreign"
    (foreign / ".git").mkdir(parents=True)
    (foreign / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return {
        "foreign": str(foreign),
        "other_tokenizer": str(other_tokenizer),
        "lost": str(tmp_path / "lost"),
        "run": str(copy),
        "dir": str(folder),
        "config": str(write_config(tmp_path, "new")),
        "run_config": str(run_config),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("command", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_input_is_named_and_nothing_is_overwritten(command, words, places, capsys):
    before = {name: contents(Path(places[name])) for name in ("run", "dir", "foreign")}
    status = here(*(part.format(**places) for part in command))
    out, err = capsys.readouterr()
    assert status == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err
    assert {name: contents(Path(places[name])) for name in ("run", "dir", "foreign")} == before
    assert not Path(places["config"]).with_suffix("").exists()  # the folder of the run that would have begun


def test_a_run_with_damaged_files_is_named(places, capsys):
    run = Path(places["run"])
    for file, content, words in (
        ("config.json", b"{", "no JSON"),
        ("config.json", b"[]", "holds no settings"),
        ("config.json", b'{"model": {"depth": 3}}', "model.depth: there is no such field"),
        ("tokenizer/tokenizer.model", b"junk", "is damaged"),
        ("export/model.safetensors", b"junk", "these weights cannot be read"),
        ("export/config.json", b"[]", "holds no settings"),
        ("export/config.json", b'{"architectures": ["LlamaForCausalLM"]}', "vocab_size is None"),
        ("export/config.json", b'{"architectures": ["Other"]}', "what can be read is GemmaForCausalLM, GemmaFor"),
    ):
        path = run / file
        good = path.read_bytes()
        path.write_bytes(content)
        model = run / "export" if file.startswith("export") else run
        assert here("generate", model, "--prompt=a") == 2
        assert words in capsys.readouterr().err
        path.write_bytes(good)


def test_a_config_file_that_fails_is_named_with_its_line(tmp_path: Path, capsys):
    for text, words in (
        ("x = 1\ny = (", "bad.py:2: "),
        ("x = 1\n\nraise KeyError('a')", "bad.py:3: KeyError: 'a'"),
        ("def get_config():\n    x = {}\n    return x['learning_rate']", "bad.py:3: KeyError: 'learning_rate'"),
        ("def get_config():\n    return 1 / 0", "bad.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return {}", "must return a ConfigDict"),
        ("x = 1", "must define get_config()"),
    ):
        (tmp_path / "bad.py").write_text(text)
        assert here("pretrain", f"--config={tmp_path / 'bad.py'}") == 2
        assert words in capsys.readouterr().err


def test_missing_and_unknown_flags_of_a_command_have_status_2(capsys):
    for command in (["pretrain"], ["generate"], ["export", "run", "--format=onnx", "--to=x"], []):
        assert here(*command) == 2
        assert "usage: ziggurat" in "".join(capsys.readouterr())


def test_all_problems_of_a_config_come_at_once(capsys):
    assert here("pretrain", "--config=tiny", "--config.model.layers=2", "--config.train.num_steps=0",
                "--config.optimizer.beta1=2", "--config.data.prefetch=x") == 2  # fmt: skip
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_hidden_room_is_refused(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("")
    paths = [str(tmp_path), str(ROOT)]
    program = f"import sys; sys.path[:0] = {paths}; from launch.cli import main; sys.exit(main(['export']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "the package 'model' resolves to" in done.stderr


def test_an_outage_is_a_fault_that_a_new_start_may_mend(capsys):
    assert report_error(ConnectionError("s3://texts/a.jsonl cannot be read after 5 tries (TimeoutError)")) == 1
    assert capsys.readouterr().err.startswith(
        "ziggurat: s3://texts/a.jsonl cannot be read after 5 tries (TimeoutError); start again"
    )


def test_bad_inputs_drawn_at_random_are_refused_or_do_no_harm():
    """`python -m tests.benchmarks.bad_inputs` draws hundreds."""
    command = [sys.executable, "-m", "tests.benchmarks.bad_inputs", "16", "--seed=2", "--run-files=8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
