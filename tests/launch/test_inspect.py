"""`ziggurat inspect attention` and `inspect embedding` on a small run."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import END_OF_TEXT
from launch.inspect_embedding import tokens_of
from tests.launch.page.test_attention_page import data_of, weights_of
from tests.launch.small_run import here
from tests.peers import require

PROMPT = "the cat eats a dog.\nmy bird sees"


def test_the_page_shows_the_attention_that_transformers_tells_of_the_export(finished: Path, tmp_path: Path, capsys):
    torch, transformers = require("torch"), require("transformers")
    output = tmp_path / "new" / "page.html"
    capsys.readouterr()
    for model in (finished, finished / "export"):  # the second page replaces the first
        assert here("inspect", "attention", model, f"--prompt={PROMPT}", f"--to={output}") == 0
        assert capsys.readouterr().out == f"{output}\n"
        page = output.read_text()
        tokenizer = load_tokenizer(finished / "tokenizer")
        ids = tokenizer.encode_with_bos(PROMPT)
        assert data_of(page)["tokens"][0] == END_OF_TEXT
        assert "".join(data_of(page)["tokens"][1:]) == PROMPT.replace("\n", "↵")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "export", attn_implementation="eager")
        with torch.no_grad():
            expected = theirs(torch.tensor([ids]), output_attentions=True).attentions
        expected = np.concatenate([layer.numpy() for layer in expected])
        assert np.abs(np.sqrt(weights_of(page)) - np.sqrt(expected)).max() <= 0.5 / 255 + 1e-4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt="], "--prompt: empty"),
        (["--prompt=\ud800"], "--prompt: not valid UTF-8"),
        (["--prompt=" + "the cat " * 20], "the model sees 32 at once"),
        (
            ["--prompt=a", "--to={dir}/notes.txt"],
            "notes.txt exists and is no page of attention; name another file with --to",
        ),
        (["--prompt=a", "--to={dir}/notes.txt/page.html"], "notes.txt is a file; name another path"),
        (["--prompt=a", "--to={dir}"], "exists and is no page of attention"),
    ],
)
def test_what_no_page_can_be_made_of_is_refused(flags: list[str], words: str, finished: Path, tmp_path: Path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    flags = [flag.format(dir=tmp_path) for flag in flags]
    if len(flags) == 1:
        flags.append(f"--to={tmp_path / 'page.html'}")
    assert here("inspect", "attention", finished, *flags) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def planted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in whose embedding bird = cat − dog + fish, and eats is close to sees."""
    folder = tmp_path_factory.mktemp("planted") / "weights"
    shutil.copytree(finished / "export", folder)
    tokenizer, weights = load_tokenizer(folder), load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"] = np.array(weights["model.embed_tokens.weight"], copy=True)
    of = {word: tokens_of(tokenizer, word) for word in ("cat", "dog", "fish", "bird", "eats", "sees")}
    assert all(len(tokens) == 1 for tokens in of.values())
    axes = np.eye(table.shape[1], dtype=np.float32)
    for word, row in {"cat": axes[0] + axes[1], "dog": axes[0], "fish": axes[2], "bird": 3 * (axes[1] + axes[2]),
                      "eats": axes[3], "sees": axes[3] + 0.1 * axes[4]}.items():  # fmt: skip
        table[of[word][0]] = row
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nearest(capsys, *arguments: object) -> list[dict]:
    capsys.readouterr()
    assert here("inspect", "embedding", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)["nearest"]


def test_the_nearest_token_is_the_planted_one(planted: Path, capsys):
    found = nearest(capsys, planted, "--word=cat", "--minus=dog", "--plus=fish", "--top=3")
    assert found[0]["token"] == " bird"
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert len(found) == 3
    assert found[0]["cosine"] > found[1]["cosine"] >= found[2]["cosine"]
    found = nearest(capsys, planted, "--word=eats")
    assert found[0]["token"] == " sees"
    assert found[0]["cosine"] == pytest.approx(1 / np.sqrt(1.01))
    assert len(found) == 10
    assert here("inspect", "embedding", planted, "--word=eats", "--top=1") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["'", "sees'", str(found[0]["id"]), "0.9950"]


def test_the_words_own_tokens_are_no_answer_and_which_they_are_is_said(planted: Path, capsys, caplog):
    caplog.set_level(logging.INFO, "ziggurat")
    found = nearest(capsys, planted, "--word=xylophone", "--top=400")
    tokenizer = load_tokenizer(planted)
    own = tokens_of(tokenizer, "xylophone")
    assert len(own) > 1
    assert tokenizer.decode(own) == " xylophone"
    assert not {row["id"] for row in found} & {*own, tokenizer.eos_id}
    assert "--word=xylophone: the mean of ' '" in caplog.text
    nearest(capsys, planted, "--word=cat")
    assert "--word=cat: ' cat'" in caplog.text
    # A space at its beginning is the user's own; without one it is a token of its own where only that is one.
    assert tokens_of(tokenizer, " cat") == tokens_of(tokenizer, "cat")
    assert tokens_of(tokenizer, "q") == tokenizer.encode("q").tolist() != tokenizer.encode(" q").tolist()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--word="], "--word is empty"),
        (["--word=cat", "--plus=", "--top=0"], "--plus is empty; give a word\n"),
        (["--word=cat", "--minus=cat"], "--word, --minus and --plus cancel each other"),
        (["--word=\ud800"], "--word: not valid UTF-8"),
    ],
)
def test_words_that_have_no_neighbours_are_refused(flags: list[str], words: str, finished: Path, capsys):
    assert here("inspect", "embedding", finished, *flags) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
