"""Config files that are odd Python: each problem is a line that names the file or the field, and status 2."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import InputError
from launch.exit_status import report_error
from launch.presets import load_config

HEAD = """
import sys
from ml_collections import ConfigDict, config_dict

class Ended(BaseException): pass

class Bad:
    def __init__(self, error=ValueError): self.error = error
    def __repr__(self): raise self.error

class BadText(Exception):
    def __str__(self): raise Ended

class Made(ConfigDict):
    def to_dict(self): return self.__dict__["made"]

def made(values):
    config = Made()
    config.__dict__["made"] = values
    return config

def deep(): return deep()

def nested(levels):
    value = 1
    for _ in range(levels): value = [value]
    return value

"""
RAISED = [
    "sys.exit(0)", "sys.exit('x')", "sys.exit(None)", "raise Ended('no')", "raise GeneratorExit", "raise BadText",
    "raise ValueError(10**5000)", r"raise ValueError('a\nb')", r"raise ValueError('\x1b[31m\ud800')", "raise Bad",
    "raise ValueError('x' * 10**6)", "raise SyntaxError", "exec('(')", "deep()", "raise BrokenPipeError",
    "raise OSError(28, 'x')", "raise MemoryError", "raise ConnectionError", "raise KeyError(Bad(Ended))",
    r"raise type('a\nb', (Exception,), {})", "int('9' * 5000)", "import no_such_module",
]  # fmt: skip
VALUES = [
    "10**5000", "Bad()", "Bad(Ended)", "Bad(SystemExit(0))", "[Bad(Ended)]", "nested(20)", "nested(10**4)", "object()",
    "float('nan')", r"'\x00'", r"'\ud800'", "b'x'", "{1: Bad()}", "{None: 1, 'a': 2}", "{'a': Bad()}", "{Bad(): 1}",
    "{'a': {'weight': [[0, Bad()]]}}", "{'a': {'epochs': 10**5000}}", "{'a': {1: 2, 'b': 3}}", "deep", "1j", "()",
    "config_dict.required_placeholder(int)", "type('S', (str,), {})('x')",
]  # fmt: skip
NAMES = [
    "1",
    "1.5",
    "None",
    "(1,)",
    "''",
    "'a.b'",
    r"'x\ny'",
    r"'\ud800'",
    "b'x'",
    "Bad()",
    "Bad(Ended)",
    "'m' * 10**5",
]
# Of each of these types: a number, a mapping of corpora, a mapping of steps, a pair, a choice.
FIELDS = ["train.num_steps", "data.corpus", "recovery.skips", "train.profile_steps", "optimizer.schedule"]
FUNCTION = "def get_config():\n    "


def problems(path: Path, text: str, capsys: pytest.CaptureFixture) -> list[str]:
    """The lines that a command prints about this config file."""
    path.write_bytes((HEAD + text).encode(errors="surrogateescape"))
    with pytest.raises(InputError) as raised:
        load_config(str(path), {})
    assert report_error(raised.value) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines, text
    assert all(line.startswith("ziggurat: ") and len(line) < 2500 and line.isprintable() for line in lines), lines
    return [line.removeprefix("ziggurat: ") for line in lines]


SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


@SETTINGS
@given(raised=st.sampled_from([*RAISED, "x = '\0'", "x = (", "# \udcff"]), begin=st.sampled_from(["", FUNCTION]))
def test_whatever_a_config_file_raises_is_one_line_that_names_it(raised: str, begin: str, tmp_path: Path, capsys):
    [line] = problems(tmp_path / "odd.py", begin + raised, capsys)
    assert line.startswith(f"{tmp_path / 'odd.py'}:")


@SETTINGS
@given(name=st.sampled_from(FIELDS), value=st.sampled_from(VALUES), is_made=st.booleans())
def test_an_odd_value_of_a_config_file_is_refused_by_its_field(name, value, is_made, tmp_path: Path, capsys):
    group, field = name.split(".")
    values = f"{{{group!r}: {{{field!r}: {value}}}}}"
    for line in problems(
        tmp_path / "odd.py", f"{FUNCTION}return {'made' if is_made else 'ConfigDict'}({values})", capsys
    ):
        assert line.startswith((name, f"{tmp_path / 'odd.py'}:"))


@SETTINGS
@given(names=st.lists(st.sampled_from(NAMES), min_size=1), is_field=st.booleans(), is_made=st.booleans())
def test_odd_names_in_a_config_file_are_no_names_of_groups_or_fields(names, is_field, is_made, tmp_path: Path, capsys):
    values = "{" + ", ".join(f"{name}: {{'a': 1}}" for name in names) + "}"
    values = f"{{'train': {values}}}" if is_field else values
    lines = problems(tmp_path / "odd.py", f"{FUNCTION}return {'made' if is_made else 'ConfigDict'}({values})", capsys)
    assert all("there is no such" in line or line.startswith(f"{tmp_path / 'odd.py'}:") for line in lines)


def test_a_config_that_gives_no_values_is_refused(tmp_path: Path, capsys):
    for text in ("return made([1])", "return made(None)", "return 10**5000", "return Bad(Ended)", "return deep"):
        assert "it must return a ConfigDict" in problems(tmp_path / "odd.py", FUNCTION + text, capsys)[0]
