"""A run that fills in the middle resumes exactly, shows what it reads, and leaves with its marks (C1, C4, C7, C9)."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from data.infilling import middle_prompt
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import FIM_TOKENS
from tests.data import others
from tests.data.test_infilling import with_marks
from tests.launch.small_run import back_to, here, metrics, write_config
from tests.launch.test_pretrain import assert_same_end, without_times
from train.evaluation import continuation
from train.evaluation.continuation import continuations
from train.run.folder import Run

FIM = ["--config.data.fim_rate=0.7", "--config.train.num_steps=6", "--config.checkpoint.every_steps=3"]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    assert here("pretrain", f"--config={write_config(folder)}", *FIM) == 0
    return folder / "run"


def test_a_run_resumes_within_its_documents(filled: Path, tmp_path: Path):
    again = back_to(3, filled, tmp_path / "again")
    assert here("pretrain", f"--config={again}") == 0
    assert_same_end(again, filled, 6)
    assert without_times(metrics(again))[-3:] == without_times(metrics(filled))[-3:]


def test_held_out_text_is_that_of_a_run_without_it_and_a_batch_shows_the_pieces(filled: Path, finished: Path, capsys):
    texts = [document.text for document in Run(filled).held_out_texts()]
    assert texts == [document.text for document in Run(finished).held_out_texts()]
    capsys.readouterr()
    assert here("inspect", "data", filled, "--step=2") == 0
    shown = capsys.readouterr().out
    for text in (*FIM_TOKENS, " (PSM, its middle is characters ", " (SPM, its middle is characters "):
        assert text in shown
    assert here("inspect", "data", filled, "--step=2", "--json") == 0
    parts = [part for row in json.loads(capsys.readouterr().out)["rows"] for part in row["parts"]]
    assert {part.get("fim") for part in parts} == {"PSM", "SPM", None}
    assert sum(part["tokens"] for part in parts) == 8 * 32


def test_the_marks_leave_with_the_weights(filled: Path):
    tokenizer = load_tokenizer(filled / "tokenizer")
    assert tokenizer.fim_tokens == FIM_TOKENS
    written = json.loads((filled / "export" / "tokenizer_config.json").read_text())
    assert [*written["extra_special_tokens"].values()] == [*FIM_TOKENS]
    added = json.loads((filled / "export" / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in added if token["special"]}
    assert [special[name] for name in FIM_TOKENS] == [*tokenizer.fim_ids()]


def test_a_middle_is_generated_between_a_prompt_and_a_suffix(filled: Path, tmp_path: Path, monkeypatch, capsys):
    asked: list[list[int]] = []
    texts: list[str] = []

    def spied(generator, tokenizer, prompts, **options):
        asked.extend(prompts)
        for part in continuations(generator, tokenizer, prompts, **options):
            texts.append(part.text)
            yield part

    monkeypatch.setattr(continuation, "continuations", spied)
    spm = Run(shutil.copytree(filled, tmp_path / "spm"))
    config = spm.load_config()
    spm.save_config(dataclasses.replace(config, data=dataclasses.replace(config.data, fim_spm_rate=1.0)))
    flags = ["--prompt=the cat", "--suffix= a dog.", "--greedy", "--max_new_tokens=6"]
    for model in (filled, filled / "export", spm.folder):
        capsys.readouterr()
        texts.clear()
        assert here("generate", model, *flags) == 0
        assert capsys.readouterr().out == f"the cat{''.join(texts)} a dog."
    tokenizer = load_tokenizer(filled / "tokenizer")
    psm, other = (middle_prompt(tokenizer, "the cat", " a dog.", spm=spm) for spm in (False, True))
    assert asked == [psm, psm, other]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suffix=b"], "--suffix is what comes after --prompt; give both"),
        (["--suffix=b", "--prompts=-"], "--suffix is what comes after --prompt; give both"),
        (
            ["--suffix=b", "--prompt=" + "the cat " * 40],
            " tokens with their marks, and --max_new_tokens is 64, but",
        ),
        (["--suffix=b", "--prompt=a", "--max_new_tokens=32"], "but the model sees 32; give shorter texts or fewer new"),
    ],
)
def test_a_middle_that_cannot_be_is_refused(filled: Path, flags: list[str], words: str, capsys):
    capsys.readouterr()
    assert here("generate", filled, *flags) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_model_without_marks_is_not_asked_for_a_middle(finished: Path, capsys):
    for model in (finished, finished / "export"):
        assert here("generate", model, "--prompt=a", "--suffix=b") == 2
        captured = capsys.readouterr()
        [line] = captured.err.splitlines()
        assert "--suffix: the tokenizer of " in line
        assert "has no tokens that are known to mark prefix, suffix and middle; give a model that was trained" in line
        assert captured.out == ""


def test_a_tokenizer_without_marks_is_refused_and_with_named_ones_used(filled: Path, tmp_path: Path, capsys):
    plain = others.write(tmp_path / "plain", others.byte_level("gpt2"), others.EOS)
    start = ["pretrain", f"--config={write_config(tmp_path)}", *FIM, "--config.data.validation_fraction=0"]
    for flags, words in (
        ([f"--config.tokenizer.path={plain}"], "has no tokens that are known to mark prefix, suffix and middle"),
        ([f"--config.tokenizer.path={plain}", "--config.data.fim_tokens=ab,cd,ef"], "has no added token 'ab'; it has"),
        (
            ["--config.data.fim_tokens=a,b"],
            "data.fim_tokens is 'a,b'; it must be three names of two characters or more",
        ),
    ):
        capsys.readouterr()
        assert here(*start, *flags) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.json").exists()
    # A run without it cannot go on with it, and the other way.
    assert here("pretrain", f"--config={filled}", "--config.data.fim_rate=0") == 2
    assert "data.fim_rate" in capsys.readouterr().err

    names = ("<[P]>", "<[S]>", "<[M]>")
    named = others.write(tmp_path / "named", with_marks("gpt2", True, names), others.EOS)
    flags = [f"--config.tokenizer.path={named}", f"--config.data.fim_tokens={','.join(names)}"]
    assert here(*start, *flags, "--config.train.num_steps=1") == 0
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fim_tokens == names
    assert load_tokenizer(tmp_path / "run" / "export").fim_tokens == names
