import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.files import json_file
from data.files.json_file import parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
BAD = {
    "deep": "[" * 10**5 + "]" * 10**5,
    "deeper than readers can go on with": '{"a": ' * 200 + "1" + "}" * 200,
    "digits": "1" * 5000,
    "surrogate": r'"\ud800"',
    "surrogate in a name": r'{"\uDFFF": 1}',
    "twice": '{"a": 1, "a": 2}',
    "torn": '{"a": ',
}


@given(VALUES, st.booleans())
def test_json_that_is_good_is_read_as_by_the_library(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@given(st.integers(0, 3))
def test_json_that_cannot_be_used_is_a_value_error_of_one_line(bad, depth):
    text = '{"x": [' * depth + bad + "]}" * depth
    with pytest.raises(ValueError, match=r"\A[^\n]{3,200}\Z"):
        parse_json(text)


@pytest.mark.parametrize(
    "content", [*(b'{"x": %s}' % bad.encode() for bad in BAD.values()), b"\xff", b"[]", b"", rb'{"a": "\\\u0000"}']
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"\A{file} [^\n]*; mend it\Z"):
        read_json(file, "mend it")


def test_pipes_devices_folders_and_large_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "LARGEST_FILE", 10)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_text('{"a": 12345}')
    for name in ("pipe", "device", "folder", "large"):
        with pytest.raises(InputError, match=name):
            read_json(tmp_path / name)


def test_an_escaped_backslash_makes_no_nul(tmp_path):
    (tmp_path / "a").write_text(r'{"a": "\\u0000"}')
    assert read_json(tmp_path / "a") == {"a": r"\u0000"}
