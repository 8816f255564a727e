"""Commands on a finished run: evaluate, generate, export, tokenize, and help that imports no JAX."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data.config import DataConfig
from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import END_OF_TEXT
from data.tokenizer.training import train_tokenizer
from launch.evaluate import with_bounded_rows
from model.config import ModelConfig
from tests.data.texts import code
from tests.launch.small_run import ROOT, here, metrics, write_config
from tests.peers import require
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import Config
from train.devices.mesh import one_device_mesh
from train.evaluation.held_out import gzip_bits_per_byte
from train.evaluation.inspection import inspect_positions
from train.run.folder import HeldOutDocument, Run
from train.step.optimizer import make_optimizer
from train.step.state import abstract_state
from train.weights.huggingface import exported_step
from train.weights.load import Trained, load_trained


def test_help_lists_the_commands_and_imports_no_jax():
    program = "import sys; from launch.cli import main\ntry: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("tokenize", "pretrain", "evaluate", "inspect loss", "generate", "export", "launch local"):
        assert f"\n  {command} " in done.stdout


def test_help_of_pretrain_lists_every_field_with_its_default_and_imports_no_jax():
    program = (
        "import sys; from launch.cli import main\n"
        "try: main(['pretrain', '--help'])\nfinally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--config.mesh.fsdp INTEGER" in done.stdout
    assert "(default: 0.0003)" in done.stdout


def evaluated(capsys, *arguments: object) -> dict:
    assert here("evaluate", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("field", "value"), [("attention_kernel", "cudnn"), ("compute_dtype", "bfloat16"), ("matmul_dtype", "int8")]
)
def test_a_run_is_evaluated_as_its_export_whatever_it_computed_with(
    finished: Path, tmp_path: Path, capsys, field: str, value: str
):
    elsewhere = tmp_path / "run"
    shutil.copytree(finished, elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    config["model"][field] = value
    (elsewhere / "config.json").write_text(json.dumps(config))
    assert evaluated(capsys, elsewhere)["loss"] == evaluated(capsys, finished)["loss"]


def test_weights_that_are_loaded_outside_a_mesh_ask_for_one(finished: Path):
    for where in (finished, finished / "export"):
        with pytest.raises(InputError, match="with jax.set_mesh"):
            load_trained(str(where))


def test_weights_of_a_run_that_are_no_numbers_are_refused_by_name(finished: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = Run.load(run)[1].resolved(load_tokenizer(run / "tokenizer").vocab_size)
    checkpoints = Checkpoints(run / "checkpoints")
    with jax.set_mesh(one_device_mesh()):
        state, progress = checkpoints.restore_step(12, abstract_state(config, make_optimizer(config)))
        up = state["weights"]["blocks"]["feedforward"]["up"]
        state["weights"]["blocks"]["feedforward"]["up"] = up * np.nan
        del progress["checksums"]
        checkpoints.save(state | {"step": state["step"] + 1}, progress)
        checkpoints.wait()
    checkpoints.close()
    for command in (
        ["generate", run, "--prompt=a"],
        ["evaluate", run, "--json"],
        ["inspect", "loss", run, "--prompt=a"],
        ["export", run, "--format=hf", f"--to={tmp_path / 'out'}"],
    ):
        assert here(*command) == 2
        out, err = capsys.readouterr()
        assert re.search(r"feedforward\.up|up_proj", err), err
        assert "NaN or infinite values" in err
        assert not out
    assert evaluated(capsys, f"{run}@12")["step"] == 12


def test_a_run_with_another_tokenizer_than_it_was_trained_with_is_refused(finished: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "tokenizer")
    # Of as many pieces, so that every id has a row of the embedding.
    train_tokenizer([text.upper() for text in code()[:20]], 400, run / "tokenizer")
    for command in (
        ["generate", run, "--prompt=a"],
        ["evaluate", run],
        ["inspect", "embedding", run, "--word=a"],
        ["export", run, "--format=hf", f"--to={tmp_path / 'out'}"],
    ):
        assert here(*command) == 2
        assert f"{run / 'tokenizer'} is not the tokenizer that the run was trained with" in capsys.readouterr().err


def test_a_run_evaluates_to_the_figures_of_its_last_step(finished: Path, capsys):
    found, last = evaluated(capsys, finished), metrics(finished)[-1]
    assert found["step"] == 12
    assert found["loss"] == pytest.approx(last["held_out_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["held_out_bits_per_byte"], rel=1e-5)
    texts = Run(finished).held_out_texts()
    assert found["bytes"] == sum(len(text.text.encode()) for text in texts)
    tokenizer = load_tokenizer(finished / "tokenizer")
    assert found["tokens"] == sum(len(tokenizer.encode(text.text)) + 1 for text in texts)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"])
    assert found["gzip_bits_per_byte"] == pytest.approx(gzip_bits_per_byte(texts))
    assert here("evaluate", finished) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_every_command_takes_a_run_at_a_step(finished: Path, tmp_path: Path, capsys):
    older = f"{finished}@8"
    assert here("export", older, "--format=hf", f"--to={tmp_path / 'weights'}") == 0
    assert exported_step(tmp_path / "weights") == 8
    found = []
    for model in (older, tmp_path / "weights", finished):
        corpus = f"--corpus={finished / 'held_out.jsonl'}"
        capsys.readouterr()
        assert here("inspect", "loss", model, "--prompt=the cat eats", "--json") == 0
        inspected = json.loads(capsys.readouterr().out)["loss"]
        assert here("generate", model, "--prompt=the cat", "--greedy", "--max_new_tokens=8") == 0
        assert capsys.readouterr().out.startswith("the cat")
        found.append([evaluated(capsys, model, corpus)["loss"], inspected])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[2], rel=1e-2)
    assert evaluated(capsys, older)["step"] == 8


def test_inspect_loss_shows_what_one_pass_learns_at_every_position(finished: Path, tmp_path: Path, capsys):
    text = "the cat eats a dog."
    assert here("inspect", "loss", finished, f"--prompt={text}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["positions"]
    assert "".join(row["target"] for row in rows[:-1]) == text
    assert [row["input"] for row in rows] == [END_OF_TEXT, *(row["target"] for row in rows[:-1])]
    assert rows[-1]["target"] is rows[-1]["loss"] is None
    for row in rows:
        probabilities = [best["probability"] for best in row["best"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)
        for best in row["best"]:
            if best["token"] == row["target"]:
                assert row["loss"] == pytest.approx(-math.log(best["probability"]), rel=1e-5)
    assert sum(row["target"] in [best["token"] for best in row["best"]] for row in rows) >= 2

    # A pass over each prefix alone gives the token that follows it the same loss.
    for t in (0, 3, len(rows) - 2):
        prefix = "".join(row["target"] for row in rows[: t + 1])
        assert here("inspect", "loss", finished, f"--prompt={prefix}", "--json") == 0
        assert json.loads(capsys.readouterr().out)["positions"][t]["loss"] == pytest.approx(rows[t]["loss"], abs=1e-4)

    # The losses are those of `evaluate`, but for the end of the document, which is a target there.
    (tmp_path / "text.txt").write_text(text)
    whole = evaluated(capsys, finished, f"--corpus={tmp_path / 'text.txt'}")
    rest = whole["loss"] * whole["tokens"] - sum(row["loss"] for row in rows[:-1])
    assert rest == pytest.approx(-math.log(end_probability(finished, text)), abs=1e-3)

    assert here("inspect", "loss", finished, f"--prompt={text}") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"loss {found['loss']:.4f} nats a token")


def end_probability(run: Path, text: str) -> float:
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(run))
        tokens = trained.tokenizer.encode(text)
        last = inspect_positions(trained.config, trained.weights, trained.tokenizer, tokens, 512)[-1]
    return next(best["probability"] for best in last["best"] if best["token"] == END_OF_TEXT)


def test_exported_weights_evaluate_as_the_run_does(finished: Path, tmp_path: Path, capsys):
    assert here("export", finished, "--format=hf", f"--to={tmp_path / 'weights'}") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'weights'}\n"
    corpus = finished / "held_out.jsonl"
    run, weights = (evaluated(capsys, model, f"--corpus={corpus}") for model in (finished, tmp_path / "weights"))
    assert run["loss"] == pytest.approx(weights["loss"], rel=1e-5)
    assert run["loss"] == pytest.approx(metrics(finished)[-1]["held_out_loss"], rel=1e-5)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "weights" / name).read_bytes() == (finished / "export" / name).read_bytes()
    # An earlier export is replaced, and nothing next to it is touched.
    for name in ("weights.old", "weights.partial"):
        (tmp_path / name).mkdir()
    assert here("export", f"{finished}@8", "--format=hf", f"--to={tmp_path / 'weights'}") == 0
    capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "weights.old", "weights.partial"}
    assert evaluated(capsys, tmp_path / "weights", f"--corpus={corpus}")["loss"] != weights["loss"]


@pytest.mark.parametrize(
    ("context", "tokens", "length"),
    [
        (512, [9000], 512), (131_072, [10, 5], 1024), (131_072, [10, 1022], 1024), (131_072, [1023, 5], 2048),
        (3000, [2500], 3000), (131_072, [9000], 4096), (131_072, [], 4096),
    ],
)  # fmt: skip
def test_rows_of_weights_from_elsewhere_are_as_long_as_their_texts_need(
    context: int, tokens: list[int], length: int, caplog
):
    config = Config(model=ModelConfig(vocab_size=300), data=DataConfig(segment_length=context)).resolved()
    trained = Trained(config, weights=None, tokenizer=cast(Any, SimpleNamespace(encode=list, bos_ids=[0])))
    texts = [HeldOutDocument("a" * count) for count in tokens]
    bounded = with_bounded_rows(trained, texts)
    assert bounded.data.segment_length == length
    assert bounded.train.batch_size * length <= max(4096, 512 * config.train.batch_size)
    assert ("windows of at most 4096" in caplog.text) == (length == 4096)
    assert with_bounded_rows(trained._replace(step=8), texts) == config


def test_weights_that_were_rounded_to_bfloat16_are_read(finished: Path, tmp_path: Path, capsys):
    weights = shutil.copytree(finished / "export", tmp_path / "weights")
    path = weights / "model.safetensors"
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(path).items()}, path)
    exact, rounded = (
        evaluated(capsys, model, f"--corpus={finished / 'held_out.jsonl'}")["loss"]
        for model in (finished / "export", weights)
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=1e-2)


def test_a_short_text_is_evaluated_whole_by_a_run_that_held_much_out(finished: Path, tmp_path: Path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["validation_fraction"] = 0.9
    (run / "config.json").write_text(json.dumps(settings))
    (tmp_path / "short.txt").write_text("a")
    assert evaluated(capsys, run, f"--corpus={tmp_path / 'short.txt'}")["bytes"] == 1


@pytest.mark.parametrize("to", [".", "../link"])
def test_an_export_into_the_current_folder_or_a_link(to: str, finished: Path, tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    assert here("export", finished, "--format=hf", f"--to={to}") == 0
    assert capsys.readouterr().out == f"{to}\n"
    assert (folder / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link"}


def test_paths_of_the_command_line_may_begin_at_home(finished: Path, tmp_path: Path, monkeypatch, capsys):
    write_config(tmp_path)
    (tmp_path / "run").symlink_to(finished)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluated(capsys, "~/run", "--corpus=~/run/held_out.jsonl")["step"] == 12
    assert generated(capsys, "~/run@8", "--prompt=a").startswith("a")
    assert here("export", "~/run", "--format=hf", "--to=~/weights") == 0
    assert here("tokenize", "--config=~/run.py", "--to=~/tokenizer") == 0
    assert (tmp_path / "weights" / "model.safetensors").exists()
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size > 0


def generated(capsys, *arguments: object) -> str:
    assert here("generate", *arguments) == 0
    return capsys.readouterr().out


def test_generation_prints_prompt_and_continuation_alone(finished: Path, capsys):
    prompt = "the cat sees "
    greedy = generated(capsys, finished, f"--prompt={prompt}", "--greedy", "--max_new_tokens=40")
    assert greedy.startswith(prompt)
    assert len(greedy) > len(prompt)
    assert generated(capsys, finished / "export", f"--prompt={prompt}", "--greedy", "--max_new_tokens=40") == greedy
    sample = [generated(capsys, finished, f"--prompt={prompt}", "--top_k=3", f"--seed={seed}") for seed in (0, 0, 1)]
    assert sample[0] == sample[1] != sample[2]
    assert generated(capsys, f"{finished}@8", "--prompt=", "--seed=3") != ""


def test_a_prompt_longer_than_the_context_is_cut_and_it_says_so(finished: Path, capsys, caplog):
    prompt = "the cat sees a dog. " * 30
    assert generated(capsys, finished, f"--prompt={prompt}", "--greedy", "--max_new_tokens=40").startswith(prompt)
    assert "the model sees the last 32" in caplog.text


def test_tokens_that_only_the_model_has_are_never_drawn(tmp_path: Path, capsys):
    status = here(
        "pretrain",
        f"--config={write_config(tmp_path)}",
        "--config.model.vocab_size=600",
        "--config.train.num_steps=1",
        "--config.data.validation_fraction=0",
        "--config.checkpoint.export=false",
    )
    assert status == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert generated(capsys, run, "--prompt=a", "--top_k=0", "--temperature=9", "--max_new_tokens=100") != "a"


def test_a_run_folder_alone_is_enough(finished: Path, tmp_path: Path, capsys):
    for name in ("config.json", "tokenizer", "checkpoints", "held_out.jsonl"):
        source = finished / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    assert evaluated(capsys, tmp_path) == evaluated(capsys, finished)
    assert generated(capsys, tmp_path, "--prompt=a", "--greedy").startswith("a")


def test_tokenize_makes_a_tokenizer_that_a_run_takes(finished: Path, tmp_path: Path, capsys):
    config = finished.parent / "run.py"
    assert here("tokenize", f"--config={config}", f"--to={tmp_path / 'tokenizer'}") == 0
    assert "token ids" in capsys.readouterr().out
    made = load_tokenizer(tmp_path / "tokenizer")
    assert made.fingerprint == load_tokenizer(finished / "tokenizer").fingerprint
    status = here(
        "pretrain",
        f"--config={write_config(tmp_path)}",
        "--config.train.num_steps=1",
        f"--config.tokenizer.path={tmp_path / 'tokenizer'}",
    )
    assert status == 0
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == made.fingerprint


def test_transformers_opens_a_trained_export_with_the_same_logits_tokens_and_text(finished: Path, capsys):
    torch, transformers = require("torch"), require("transformers")
    import jax
    import jax.numpy as jnp

    from model.decoder import Decoder
    from train.devices.mesh import one_device_mesh
    from train.weights.load import load_trained

    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(finished / "export")
    prompt = "the cat likes my bird. a dog"
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(finished))
    ids = np.array(trained.tokenizer.encode_with_bos(prompt))
    assert theirs(prompt)["input_ids"] == ids.tolist()
    tokens = jnp.array(ids)[None]

    @jax.jit
    def logits(weights: dict) -> jax.Array:
        decoder = Decoder(trained.config.model, weights)
        return decoder.logits(decoder(tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens)))

    found = logits(jax.tree.map(jnp.asarray, jax.device_get(trained.weights)))
    with torch.no_grad():
        expected = model(torch.tensor(ids[None])).logits.numpy()
    assert np.abs(found[..., : trained.tokenizer.vocab_size] - expected).max() <= 1e-4
    generated_ids = model.generate(torch.tensor(ids[None]), max_new_tokens=12, do_sample=False)
    text = theirs.decode(generated_ids[0], skip_special_tokens=True)
    assert generated(capsys, finished, f"--prompt={prompt}", "--greedy", "--max_new_tokens=12") == text
