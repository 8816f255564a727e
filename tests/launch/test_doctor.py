"""The check of this machine: what is fine, what is broken, and the command that mends it."""

import tomllib
from importlib import metadata

import jax
import pytest

from launch.doctor import EXTRAS, split_requirement, within
from tests.launch.small_run import ROOT, here


def test_a_machine_that_runs_the_tests_is_fine(capsys):
    assert here("doctor") == 0
    printed = capsys.readouterr().out
    assert f"jax               {metadata.version('jax')} (" in printed
    assert "8 × cpu" in printed
    assert "BROKEN" not in printed


def test_what_is_broken_is_named_without_a_traceback(monkeypatch, capsys):
    def no_devices() -> list:
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    versions = {"flax": "0.1.0", "optax": None}
    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr("launch.doctor.installed_version", lambda name: versions.get(name, "2026.9.0"))
    assert here("doctor") == 1
    printed = capsys.readouterr().out
    assert "JAX cannot start: RuntimeError: Unable to initialize backend 'cuda'\n" in printed
    broken = {line.split()[1] for line in printed.splitlines() if line.startswith("BROKEN")}
    assert {"flax", "optax", "devices"} <= broken
    assert "not installed: " in printed
    assert "-m pip install -e '" in printed


def test_every_optional_extra_is_checked():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert EXTRAS.keys() == extras.keys() - {"test", "peers"}


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("0.10.2", "<0.13,>=0.10.2", True),
        ("0.13.0", "<0.13,>=0.10.2", False),
        ("0.9", ">=0.10.2", False),
        ("2026.9.0", "<2027,>=2026.1", True),
        ("1.0", "", True),
    ],
)
def test_a_version_is_held_against_its_bounds(version: str, bounds: str, expected: bool):
    assert within(version, bounds) is expected
    assert split_requirement(f"some.name[extra]{bounds}; python_version > '3'") == ("some.name", bounds)
