"""The project as a whole: rooms, names, one-way imports, versions, and the Makefile's targets."""

import ast
import graphlib
import keyword
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.mutations import read_table

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "data", "train", "launch")
MODULES = [ROOT / "settings.py", *(file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))]
# The rooms inside each room, lowest first; a module directly in the folder is named, or stands for all others as "".
INNER_ORDER = {
    "model": ("", "generation", "interchange"),
    "data": ("errors", "printable", "config", "files", "formats", "tokenizer", ""),
    "train": ("config", "devices", "step", "run", "checkpoint", "weights", "evaluation", "planning", ""),
    "launch": ("configs", "page", ""),
}
NAMES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in MODULES}
MAY_IMPORT = {
    "settings.py": {"settings"},
    "model": {"model", "settings"},
    "data": {"data", "settings"},
    "train": {"train", "model", "data", "settings"},
    "launch": {*ROOMS, "settings"},
}


def imported(file: Path) -> set[str]:
    """Top-level names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def inner_rank(module: str) -> int:
    """Position of a module's inner room in the order of its room."""
    room, inner = module.split(".")[:2]
    order = INNER_ORDER[room]
    return order.index(inner if inner in order else "")


def imports_of_ours(file: Path) -> set[str]:
    """Modules of ours that a file imports, those inside functions and under TYPE_CHECKING included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name in NAMES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & NAMES.keys()) or ({node.module} & NAMES.keys())
    return names


def test_the_inner_rooms_import_one_way():
    for name, file in NAMES.items():
        for other in imports_of_ours(file):
            if "." in name and "." in other and name.split(".")[0] == other.split(".")[0]:
                assert inner_rank(other) <= inner_rank(name), f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    imports = {name: imports_of_ours(file) - {name} for name, file in NAMES.items()}
    assert list(graphlib.TopologicalSorter(imports).static_order())


def test_the_training_rooms_story_is_short():
    assert len(list((ROOT / "train").glob("*.py"))) <= 12


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_imports_one_way_is_short_and_has_a_free_name(file: Path):
    room = file.relative_to(ROOT).parts[0]
    assert imported(file) & {*ROOMS, "settings"} <= MAY_IMPORT[room]
    if room == "data" and file.stem != "loader":
        assert not imported(file) & {"jax", "flax"}
    if file.stem != "__init__":
        assert file.stem not in sys.stdlib_module_names or file.parent.name == "configs"
        assert not keyword.iskeyword(file.stem)
    assert len(file.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(file.read_text()))


def docstrings() -> Iterator[tuple[str, str]]:
    """(place, docstring) of every module, class and function of the product."""
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", text


def entries() -> Iterator[tuple[str, str]]:
    """(place, text) of every argument and attribute in a docstring."""
    for place, text in docstrings():
        for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text, re.M):
            for name, words in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.M):
                yield f"{place} {name}", " ".join(words.split())


def test_every_public_function_and_class_has_a_docstring_unless_it_overrides_another():
    for file in MODULES:
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{file}:{node.lineno} {node.name}"
            bases = {ast.unparse(base) for base in getattr(node, "bases", [])}
            overrides = bases - {"NamedTuple", "Exception", "ValueError", "Protocol", "ABC"}
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and not overrides:
                    assert ast.get_docstring(method), f"{file}:{method.lineno} {method.name}"


def test_a_docstring_opens_with_a_main_clause():
    fragment = re.compile(r"(What|Of|Whether|How|That|Where|Which|Who|Yes|As)\b")
    assert [f"{place} {text[:60]}" for place, text in docstrings() if fragment.match(text)] == []


def test_an_entry_of_a_docstring_says_what_a_caller_must_know():
    everything = list(entries())
    assert len(everything) > 150
    assert [place for place, words in everything if words.lower().startswith("of ")] == []
    short = [place for place, words in everything if len(words.split()) < 4]
    assert len(short) < 0.05 * len(everything), short


def test_words_of_the_old_dialect_do_not_come_back():
    dialect = re.compile(r"\b(told|anew|so many|beside|stands? out|none: none)\b")
    lines = [(file, n, line) for file in MODULES for n, line in enumerate(file.read_text().splitlines(), 1)]
    assert [f"{file.relative_to(ROOT)}:{n} {line.strip()}" for file, n, line in lines if dialect.search(line)] == []


def test_no_function_is_longer_than_a_screen():
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}:{node.lineno} {node.name}"


def test_every_planted_fault_fits_the_code_and_its_tests_exist():
    """`python -m tests.benchmarks.mutations` plants them, which takes minutes."""
    assert [mutation for mutation in read_table() if mutation.problem()] == []


def test_the_changelog_and_the_package_have_the_same_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == version


def test_every_dependency_is_bounded_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {re.split("[= ;]", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        assert re.search(r"<|==", requirement), requirement
        name = re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-").replace(".", "-")
        assert name in pinned, requirement


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony is not None
    assert re.findall(r"^  (\w+):", listed, re.M) == phony[1].split()


def test_make_setup_names_what_is_missing(tmp_path: Path):
    for python, words in (("no-such-python", "There is no no-such-python: install Python 3.11"),):
        done = subprocess.run(
            ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert words in done.stdout
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert "is Python 3.9.2; Ziggurat needs 3.11 or later" in done.stdout
    without_venv = tmp_path / "without-venv"
    without_venv.write_text('#!/bin/sh\n[ "$2" = venv ] && exit 1\nexit 0\n')
    without_venv.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={without_venv}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "apt install python3-venv" in done.stdout
