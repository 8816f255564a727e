"""Compiled programs are kept between starts, in a folder of the user's own, up to a size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import OUR_JAX_SETTINGS
from launch.program_cache import cache_folder, keep_programs, remove_oldest
from tests.launch.small_run import ROOT, environment

FOLDER = "JAX_COMPILATION_CACHE_DIR"


def kept_by(variables: dict[str, str]) -> str | None:
    """The folder in which JAX keeps programs with these variables."""
    keep_programs(variables)
    return variables.get(FOLDER)


def start(finished: Path, cache: Path) -> tuple[int, int]:
    """(programs read, programs compiled anew) by a process that generates, with its cache in a folder."""
    variables = {name: value for name, value in environment().items() if name != FOLDER}
    variables |= {"XDG_CACHE_HOME": str(cache), "JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"}
    command = [sys.executable, "-m", "launch.cli", "generate", finished, "--prompt=the", "--max_new_tokens=4"]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.count("Persistent compilation cache hit"), done.stderr.count("PERSISTENT COMPILATION CACHE MISS")


def test_a_second_start_compiles_nothing_anew(finished: Path, tmp_path: Path):
    hits, misses = start(finished, tmp_path)
    assert misses > 0
    assert start(finished, tmp_path) == (hits + misses, 0)
    assert [*tmp_path.iterdir()] == [tmp_path / "ziggurat"]


def test_a_cache_that_cannot_be_made_is_done_without(finished: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    assert start(finished, tmp_path / "file") == (0, 0)


def test_a_users_own_choice_stays(tmp_path: Path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert kept_by(dict(home)) == str(tmp_path / "ziggurat")
    assert kept_by(home | {FOLDER: "/elsewhere"}) == "/elsewhere"
    assert kept_by(home | {FOLDER: ""}) == ""
    chosen = home | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    keep_programs(chosen)
    assert chosen["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7"


def test_a_report_of_a_jax_that_cannot_start_names_only_settings_of_the_user(tmp_path: Path):
    variables = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_programs(variables)
    ours = [f"{name}={value}" for name, value in variables.items() if name.startswith("JAX_")]
    assert len(ours) == 2
    assert all(re.match(OUR_JAX_SETTINGS, setting) for setting in ours)
    assert not re.match(OUR_JAX_SETTINGS, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=ten")


@pytest.mark.parametrize("name", ["ZIGGURAT_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_processes_keeps_nothing(name: str, tmp_path: Path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert kept_by(home | {name: "2"}) is None
    assert kept_by(home | {name: "1"}) == str(tmp_path / "ziggurat")


def test_nothing_is_kept_in_a_home_of_another_user_or_in_none(tmp_path: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
        assert kept_by({"XDG_CACHE_HOME": str(tmp_path)}) is None
        assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder({}) is None
    assert kept_by({}) is None


def test_empty_files_are_removed_and_above_a_size_those_used_longest_ago(tmp_path: Path):
    for age, name in enumerate(["newest", "middle", "oldest"]):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "empty").touch()
    remove_oldest(tmp_path, 300)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "middle", "oldest"}
    remove_oldest(tmp_path, 299)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "middle"}
    remove_oldest(tmp_path / "none", 0)
