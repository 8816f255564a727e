"""The page of attention: what it holds, and how it looks and moves in a browser."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launch.page.attention_page import MAX_WEIGHT_BYTES, make_attention_page, max_tokens, token_label
from tests.browser import Browser
from tests.peers import require_program

HOSTILE = "</script><script>alert(1)</script>"
TOKENS = ["<|endoftext|>", "the", " cat", HOSTILE, "\n    ", " fish", "."]


def attention(L: int = 3, H: int = 4, T: int = len(TOKENS)) -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(L, H, T, T)) * 2
    weights = np.tril(np.exp(scores))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]


def weights_of(page: str) -> np.ndarray:
    """The weights that the page's script reads, [L, H, T, T]."""
    data = data_of(page)
    L, H, T = data["layers"], data["heads"], len(data["tokens"])
    found = np.zeros((L, H, T, T))
    found[:, :, *np.tril_indices(T)] = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(L, H, -1)
    return (found / 255) ** 2


def test_a_page_holds_every_weight_to_half_a_percent_and_its_texts_escaped():
    page = make_attention_page("runs/small", TOKENS, attention())
    assert np.abs(weights_of(page) - attention()).max() <= 1 / 255
    assert np.abs(np.sqrt(weights_of(page)) - np.sqrt(attention())).max() <= 0.5 / 255 + 1e-6
    assert data_of(page)["tokens"][3] == HOSTILE
    assert page.count("<script") == page.count("</script>") == 2
    assert "default-src 'none'" in page
    assert [token_label(text) for text in ("\n    ", " ", " a", "\t", "a\r\n")] == ["↵␣×4", "␣", " a", "⇥", "a␍↵"]


def test_the_longest_text_of_a_large_model_gives_a_page_that_a_browser_opens():
    for layers, heads in ((4, 4), (32, 32), (96, 96)):
        T = max_tokens(layers, heads)
        assert layers * heads * T * (T + 1) / 2 <= MAX_WEIGHT_BYTES < layers * heads * (T + 1) * (T + 2) / 2
    assert max_tokens(32, 32) > 100


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require_program("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
@pytest.mark.parametrize(("heads", "length"), [(4, len(TOKENS)), (40, 130)])
def test_in_a_browser_it_fits_loads_nothing_and_shows_what_a_token_looks_at(
    heads: int, length: int, width: int, dark: bool, tmp_path: Path, browser: Browser
):
    weights = attention(H=heads, T=length)
    page, tokens = tmp_path / "attention.html", [*TOKENS, *(f" w{i}" for i in range(len(TOKENS), length))]
    page.write_text(make_attention_page("runs/small", tokens, weights))
    before = len(browser.requests)
    browser.open(page, width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 128) == dark
    assert browser.value("document.querySelectorAll('.heads button').length") == 3 * heads
    # Heads are drawn: what a token sees is opaque in proportion, what comes later is not there.
    alpha = browser.value(
        "[...document.querySelector('.field canvas').getContext('2d').getImageData(0, 0, 9, 9).data]"
        ".filter((_, i) => i % 4 === 3)"
    )
    shown = np.sqrt(weights[0, 0, : min(length, 9), : min(length, 9)]) * 255
    assert np.abs(np.array(alpha).reshape(9, 9)[: len(shown), : len(shown)] - shown).max() <= 1

    def chosen() -> list:
        script = "[document.querySelector('#which').textContent, document.querySelector('output').textContent]"
        return [
            *browser.value(script),
            browser.value("[...document.querySelectorAll('.tokens small')].map(e => e.textContent)"),
        ]

    assert chosen()[0] == "Layer 0, head 0"
    browser.value(f"document.querySelectorAll('.heads button')[{heads + 2}].click(), 0")
    browser.value("document.querySelectorAll('.tokens button')[2].scrollIntoView(), 0")
    box = browser.value(
        "JSON.parse(JSON.stringify(document.querySelectorAll('.tokens button')[2].getBoundingClientRect()))"
    )
    browser.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    title, told, percents = chosen()
    assert title == "Layer 1, head 2"
    best = int(weights[1, 2, 2].argmax())
    assert told.startswith(f"“ cat” (2) looks at “{tokens[best]}” ({best}) ")
    assert [text.rstrip("%") != "" for text in percents[:5]] == [True, True, True, False, False]
    assert [float(text.rstrip("%")) for text in percents[:3]] == pytest.approx(100 * weights[1, 2, 2, :3], abs=1)
    # In the large head: the last row's first column.
    browser.value("document.querySelector('.field').scrollIntoView({block: 'end'}), 0")
    box = browser.value("JSON.parse(JSON.stringify(document.querySelector('.field').getBoundingClientRect()))")
    browser.point(box["x"] + 2, box["y"] + box["height"] - 2)
    assert chosen()[1].startswith(f"“{tokens[-1]}” ({length - 1}) looks at “<|endoftext|>” (0) ")
    browser.point(box["x"] + box["width"] - 2, box["y"] + 2)
    assert chosen()[1].endswith(f"does not see “{tokens[-1]}” ({length - 1}), which comes later")
    assert browser.problems == []
    assert browser.requests[before:] == [page.as_uri()]
