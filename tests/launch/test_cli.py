"""The command line itself: start without JAX, messages about wrong commands, and completion."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.commands import COMMANDS
from launch.completion import SCRIPTS, candidates
from launch.presets import presets
from launch.version import version
from tests.launch.small_run import ROOT, here


@pytest.mark.parametrize(
    "command", [["--version"], ["inspect", "--help"], ["completion", "bash"], ["completion", "zsh", "--line=ziggurat "]]
)
def test_light_commands_import_no_jax(command: list[str]):
    program = f"import sys; from launch.cli import main; status = main({command}); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_no_module_of_a_command_imports_jax():
    modules = sorted({module for module, _ in COMMANDS.values()})
    program = f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(name)\n"
    check = "    assert 'jax' not in sys.modules, name\n"
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_version_is_that_of_the_changelog(capsys):
    assert here("--version") == 0
    assert capsys.readouterr().out == f"ziggurat {version()}\n"
    assert f"\n## {version()}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("group", "count"), [("inspect", 5), ("launch", 3)])
def test_the_first_word_of_several_commands_lists_them(group: str, count: int, capsys):
    assert here(group) == 2
    assert here(group, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(f"  {group} ") for line in lines) == 2 * count


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["pretran"], "pretran: there is no such command; did you mean pretrain?"),
        (["inspect", "los"], "inspect los: there is no such command; did you mean inspect loss?"),
        (["attention"], "attention: there is no such command; did you mean inspect attention?"),
        (["zzz", "--help"], "zzz: there is no such command\n"),
        (["generate", "run", "--promt=a"], "--promt=a: there is no such flag; did you mean --prompt?"),
        (["pretrain", "--confg=tiny"], "--confg=tiny: there is no such flag; did you mean --config?"),
        (["generate", "run", "more"], "more: there is no such flag"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one_and_a_short_usage(command, words, capsys):
    assert here(*command) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "usage: ziggurat" in captured.err
    assert len(captured.err.splitlines()) <= 3
    assert captured.out == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_takes_nothing_from_a_command_that_is_done(unbuffered: str):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_presets_are_listed_with_their_parameters(capsys):
    assert here("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines[1 : 1 + len(presets())]) == presets()
    assert lines[1].split()[:2] == ["tiny", "2,360,512"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ziggurat pre", ["presets", "pretrain"]),
        ("ziggurat inspect ", ["attention", "data", "embedding", "loss", "weights"]),
        ("ziggurat inspect loss r --", ["--help", "--json", "--prompt="]),
        ("ziggurat pretrain --config=ti", ["--config=tiny", "--config=tiny_experts"]),
        ("ziggurat pretrain --config=tiny --config.mesh.f", ["--config.mesh.fsdp="]),
        ("ziggurat launch local --processes=2 -- pretrain --config=ti", ["--config=tiny", "--config=tiny_experts"]),
        ("ziggurat export run --format=", ["--format=gguf", "--format=hf"]),
        ("ziggurat nothing ", []),
    ],
)
def test_a_line_is_completed_by_the_words_that_may_follow(line: str, words: list[str]):
    assert candidates(line) == words


def completed_by_bash(line: str, tmp_path: Path) -> list[str]:
    """The replies of bash's completion function, as readline calls it at the end of a line."""
    program = tmp_path / "ziggurat"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli "$@"\n')
    program.chmod(0o755)
    script = f"compopt() {{ :; }}\n{SCRIPTS['bash']}\nCOMP_LINE='{line}' COMP_POINT={len(line)}\n_ziggurat {program}\n"
    done = subprocess.run(["bash", "-c", script + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.split()


def test_bash_completes_words_and_values(tmp_path: Path):
    assert completed_by_bash("ziggurat inspect lo", tmp_path) == ["loss"]
    assert completed_by_bash("ziggurat pretrain --config=tin", tmp_path) == ["tiny", "tiny_experts"]
    assert completed_by_bash("ziggurat pretrain --config.train.run_d", tmp_path) == ["--config.train.run_dir="]
