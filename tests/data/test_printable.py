"""Texts of others as they are shown, and what cannot be a name."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.printable import lacks_credentials, name_problem, printable, shown, without_credentials

WORDS = st.text("abcXYZ019-._~%=&+$:@", min_size=1, max_size=12)


@given(st.text(st.characters()))
def test_what_is_shown_moves_no_cursor_and_can_be_encoded(text: str):
    kept = shown(text)
    assert not {c for c in kept if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\t", "\n"}
    assert not {c for c in kept if unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI")}
    kept.encode()
    assert printable("naïve “ziggurat” 日本\t語\n") == "naïve “ziggurat” 日本\t語\n"


@given(st.sampled_from(["http", "https", "s3", "hf"]), WORDS, WORDS, st.sampled_from(["", " ", "'", '"', ")", "\n"]))
def test_credentials_of_urls_are_hidden(scheme: str, user: str, secret: str, after: str):
    secret = f"se{secret}cret"
    url = f"{scheme}://{user}:{secret}@host/a/b.jsonl"
    kept = without_credentials(f"cannot read {url}{after}")
    assert secret not in kept
    assert kept == f"cannot read {scheme}://…@host/a/b.jsonl{after}"
    signed = without_credentials(f"https://host/a.jsonl?X-Amz-Signature={secret}{after}")
    assert signed == f"https://host/a.jsonl?…{after}"
    assert lacks_credentials(without_credentials(url))


@pytest.mark.parametrize(
    "url",
    ["hf://datasets/o/n@main/a.parquet", "s3://b/a?.jsonl", "abfs://box@me.dfs.core.windows.net/a", "a@b/c?d", "https://h/a"],
)  # fmt: skip
def test_what_is_no_credential_stays(url: str):
    assert without_credentials(url) == url
    assert not lacks_credentials(url)


@given(st.text(st.characters(), min_size=1).filter(lambda text: not text.startswith("~")))
def test_a_name_is_a_text_that_is_shown_as_it_is(text: str):
    is_shown = printable(text) == text and not {"\t", "\n"} & set(text)
    assert (name_problem(text) == "") == is_shown


def test_names_of_nobody_are_refused():
    assert "is empty" in name_problem("")
    assert "~nosuchuser" in name_problem("~nosuchuser/run")
