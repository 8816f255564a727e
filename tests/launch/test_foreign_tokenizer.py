"""A run on somebody else's tokenizer, from its text to its export."""

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer.folder import load_tokenizer
from data.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from data.tokenizer.training import train_tokenizer
from model.decoder import Decoder
from tests.data import others
from tests.launch.small_run import here, metrics, write_config
from tests.llama_cpp import LlamaCpp
from tests.peers import require
from train.devices.mesh import one_device_mesh
from train.evaluation.inspection import token_text
from train.weights.load import load_trained


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of `pretrain` for a run in the config's folder."""
    root = tmp_path_factory.mktemp("foreign")
    folder = others.write(root / "gpt2", others.byte_level("gpt2"), others.EOS)
    return [f"--config={write_config(root)}", f"--config.tokenizer.path={folder}", "--config.data.num_workers=1"]


@pytest.fixture(scope="module")
def run(arguments: list[str]) -> Path:
    """One that has trained. It has more ids than the tokenizer, and more than fill the last 128 of that."""
    assert here("pretrain", *arguments, "--config.train.num_steps=6", "--config.model.vocab_size=900") == 0
    return Path(arguments[0].removeprefix("--config=")).parent / "run"


def test_a_run_trains_with_it_and_hands_it_on(arguments: list[str], run: Path, tmp_path: Path, capsys):
    tokenizer = load_tokenizer(run / "tokenizer")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.fingerprint == load_tokenizer(run.parent / "gpt2").fingerprint
    losses = [record["loss"] for record in metrics(run) if "loss" in record]
    assert losses[-1] < losses[0]
    assert here("generate", run, "--prompt=the cat", "--max_new_tokens=8") == 0
    assert capsys.readouterr().out.startswith("the cat")
    assert load_tokenizer(run / "export").fingerprint == tokenizer.fingerprint
    assert here("evaluate", run / "export", f"--corpus={run.parent / 'corpus.jsonl'}") == 0
    assert (
        here("pretrain", *arguments, "--config.model.vocab_size=100", f"--config.train.run_dir={tmp_path / 'b'}") == 2
    )
    assert f"model.vocab_size = 100 is less than the tokenizer's {tokenizer.vocab_size}" in capsys.readouterr().err


def test_it_goes_into_a_gguf_file(run: Path, tmp_path: Path, capsys):
    require("gguf")
    file = tmp_path / "model.gguf"
    assert here("export", run, "--format=gguf", f"--to={file}", "--dtype=f16") == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert file.read_bytes()[:4] == b"GGUF"
    assert here("export", run, "--format=gguf", f"--to={run / 'config.json'}") == 2
    assert "is something else than a GGUF file" in capsys.readouterr().err
    text = "the cat sees  a dog.\n\n    my bird"
    assert LlamaCpp(file).tokenize(text) == load_tokenizer(run / "tokenizer").encode(text).tolist()


def test_all_tokens_that_its_template_puts_before_a_text_come_there_and_are_not_counted(tmp_path: Path, capsys):
    config, settings = write_config(tmp_path), copy.deepcopy(others.byte_level("llama3"))
    template = settings["post_processor"]["processors"][1]
    # <think>, which is no special token, has a text of its own.
    template["single"].insert(1, {"SpecialToken": {"id": "<think>", "type_id": 0}})
    template["special_tokens"]["<think>"] = {"id": "<think>", "ids": [600], "tokens": ["<think>"]}
    folder = others.write(tmp_path / "tokenizer", settings, others.EOS)
    flags = [f"--config={config}", f"--config.tokenizer.path={folder}", "--config.train.num_steps=2",
             "--config.evaluation.sample_tokens=0", "--config.checkpoint.export=false"]  # fmt: skip
    assert here("pretrain", *flags) == 0
    run, text = tmp_path / "run", "the cat sees a dog."
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(run))
    ids = trained.tokenizer.encode(text).tolist()
    weights = jax.tree.map(jnp.asarray, jax.device_get(trained.weights))
    inputs = jnp.array([[0, 600, *ids]])

    @jax.jit
    def log_probabilities(weights: dict) -> jax.Array:
        decoder = Decoder(trained.config.model, weights)
        return jax.nn.log_softmax(decoder.logits(decoder(inputs, jnp.arange(inputs.size)[None], inputs * 0 + 1)))[0]

    log_p_TV = log_probabilities(weights)
    expected = [-float(log_p_TV[t + 1, token]) for t, token in enumerate([*ids, 1])]

    shown = capsys.readouterr()
    assert "bits a byte" in shown.err + shown.out
    assert "sample:" not in shown.err + shown.out
    assert here("report", run) == 0
    assert "No sample yet." in (run / "report.html").read_text()
    capsys.readouterr()
    assert here("evaluate", run, f"--corpus={tmp_path / 'one.jsonl'}", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["tokens"] == len(ids) + 1
    assert figures["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert here("inspect", "loss", run, f"--prompt={text}", "--json") == 0
    positions = json.loads(capsys.readouterr().out)["positions"]
    assert [row["loss"] for row in positions[:-1]] == pytest.approx(expected[:-1], rel=1e-4)
    assert here("generate", run, f"--prompt={text}", "--greedy", "--max_new_tokens=1") == 0
    first = trained.tokenizer.decode([int(log_p_TV[-1, :601].argmax())])
    assert capsys.readouterr().out == text + first
    assert here("inspect", "data", run, "--step=1", "--json") == 0
    parts = [part for row in json.loads(capsys.readouterr().out)["rows"] for part in row["parts"]]
    beginnings = [part for part in parts if part["characters"][0] == 0 and not part["end"]]
    assert beginnings
    for part in beginnings:
        document = json.loads((tmp_path / "corpus.jsonl").read_bytes()[part["byte"] :].splitlines()[0])["text"]
        read = trained.tokenizer.encode(document)[: part["tokens"] - 1]
        assert part["text"] == trained.tokenizer.decode(read)


@pytest.mark.parametrize("prompts", [False, True])
def test_the_space_before_a_text_is_not_counted_as_its_own(tmp_path: Path, capsys, prompts: bool):
    config, corpus = write_config(tmp_path), tmp_path / "corpus.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    learned = train_tokenizer(texts, 330, tmp_path / "ours")
    assert isinstance(learned, SentencePieceTokenizer)
    folder = others.write(tmp_path / "llama2", others.byte_fallback("llama2", learned), "</s>")
    tokenizer = load_tokenizer(folder)
    assert "".join(token_text(tokenizer, token) for token in tokenizer.encode_with_bos("the cat")) == "<s> the cat"
    if prompts:
        corpus.write_text("".join(json.dumps({"prompt": text[:9], "text": text[9:]}) + "\n" for text in texts))
    arguments = [f"--config={config}", f"--config.tokenizer.path={folder}", "--config.data.prompt_field=prompt"]
    assert here("inspect", "data", *arguments[: 3 if prompts else 2], "--step=1", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    parts = [part for row in rows for part in row["parts"] if part["characters"][0] == 0 and not part["end"]]
    assert parts
    for part in parts:
        document = json.loads(corpus.read_bytes()[part["byte"] :].splitlines()[0])
        prompt = document.get("prompt", "")
        read = [tokenizer.encode(text) for text in (prompt, document["text"])]
        behind = max(part["tokens"] - len(read[0]), 0)
        decoded = tokenizer.decode(read[0][: part["tokens"]]) + tokenizer.decode(read[1][:behind])
        assert part["text"] == decoded
