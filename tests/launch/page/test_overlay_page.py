"""The page of several runs: curves by the tokens that were read, and its looks in a browser."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.page.chart import LEFT, MAX_COLUMNS, RIGHT
from launch.page.overlay_page import COLORS, make_overlay_page
from tests.browser import Browser
from tests.launch.page.test_report_page import HOSTILE, make_run, record
from tests.peers import require_program
from train.run.folder import Run


def some_run(folder: Path, steps: int = 100, rows: int = 8, above: float = 0.0, **config: dict) -> Run:
    """A run that evaluates every 10 steps."""
    records = [
        record(s, s == 1 or s % 10 == 0, loss=3 + above + 4 / s, validation_loss=3.0) for s in range(1, steps + 1)
    ]
    return make_run(folder, records, [], train={"num_steps": steps, "batch_size": rows}, **config)


def readouts(page: str) -> dict:
    """The data of a page's script."""
    found = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_curves_lie_over_each_other_by_tokens(tmp_path: Path):
    small, large = some_run(tmp_path / "small"), some_run(tmp_path / "large", steps=50, rows=32, above=1.0)
    page = make_overlay_page("2 runs", {"small": [small], "large": [large]})
    data = readouts(page)
    # 100 steps of 8 rows of 32 positions, and 50 of 32.
    assert data["between"] == [0, 51_200]
    held_out = data["charts"]["validation_bits_per_byte"]
    assert [line["group"] for line in held_out] == [0, 1]
    assert held_out[0]["x"][:2] == [256, 2560]
    assert held_out[1]["x"][-1] == 51_200
    assert held_out[0]["y"][-1] == pytest.approx(1.51)
    figure = next(part for part in page.split("<figure ") if part.startswith('data-chart="validation_bits'))
    paths = re.findall(r'class="over hue(\d)" d="M([\d.]+) .*?([\d.]+) [\d.]+"', figure)
    assert [hue for hue, *_ in paths] == ["0", "1"]
    assert float(paths[0][2]) == pytest.approx(LEFT + (RIGHT - LEFT) / 2, abs=0.1)
    assert float(paths[1][2]) == pytest.approx(RIGHT, abs=0.1)
    assert "train.<wbr>batch_size</td><td>8</td><td>32</td>" in page
    assert "run_dir" not in page


def test_seeds_of_a_variant_are_thin_lines_of_one_colour(tmp_path: Path):
    runs = [some_run(tmp_path / f"a-{seed}") for seed in range(3)]
    page = make_overlay_page(
        "x", {"a": runs, "b": [some_run(tmp_path / "b")]}, [("name", "value"), (HOSTILE, "2")], ["n."]
    )
    figure = next(part for part in page.split("<figure ") if part.startswith('data-chart="loss"'))
    assert figure.count('class="over hue0 thin"') == 3
    assert figure.count('class="over hue1"') == 1
    assert "<small> 3 runs</small>" in page
    assert "<img" not in page
    assert '<p class="quiet">n.</p>' in page
    assert "Nothing but folders and seeds." in page


def test_runs_that_have_just_begun_and_odd_values_have_a_page(tmp_path: Path):
    empty = make_run(tmp_path / "empty", [], [])
    assert "<figure" not in make_overlay_page("x", {"a": [empty], "b": [empty]})
    odd = make_run(tmp_path / "odd", [record(1, loss=math.nan), record(2, loss=None, loss_weight=0.0)], [])
    data = readouts(make_overlay_page("x", {"a": [odd], "empty": [empty], "c": [some_run(tmp_path / "c")]}))
    assert data["charts"]["loss"][0]["y"] == [None]
    many = make_overlay_page("x", {str(i): [some_run(tmp_path / f"m{i}")] for i in range(COLORS + 1)})
    assert 'class="over hue0 dashed"' in many


def test_the_page_of_long_runs_is_small(tmp_path: Path):
    runs = {str(i): [some_run(tmp_path / str(i), steps=30_000)] for i in range(2)}
    page = make_overlay_page("x", runs)
    assert len(page) < 800_000
    assert len(readouts(page)["charts"]["loss"][0]["x"]) <= MAX_COLUMNS


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require_program("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser_it_fits_and_shows_the_mean_of_each_group(
    width: int, dark: bool, tmp_path: Path, browser: Browser
):
    groups = {"a": [some_run(tmp_path / "a0"), some_run(tmp_path / "a1", above=1.0)], "b": [some_run(tmp_path / "b")]}
    page = tmp_path / "page.html"
    page.write_text(make_overlay_page("x", groups))
    before = len(browser.requests)
    browser.open(page, width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    drawn = browser.value(
        "[...document.querySelectorAll('figure[data-chart=loss] .over')].map(p => p.getTotalLength())"
    )
    assert len(drawn) == 3
    assert min(drawn) > 100
    colors = browser.value(
        "[...document.querySelectorAll('figure[data-chart=loss] .over')].map(p => getComputedStyle(p).stroke)"
    )
    assert colors[0] == colors[1] != colors[2]
    outputs = (
        "[...document.querySelectorAll('figure[data-chart=validation_bits_per_byte] output')].map(o => o.textContent)"
    )
    assert browser.value(outputs) == ["1.51", "1.51"]
    loss = "[...document.querySelectorAll('figure[data-chart=loss] output')].map(o => Number(o.textContent))"
    at_end = browser.value(loss)
    assert at_end[0] - at_end[1] == pytest.approx(0.5, abs=0.01)
    box = browser.value("JSON.parse(JSON.stringify(document.querySelector('svg').getBoundingClientRect()))")
    browser.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert browser.value(loss)[1] > at_end[1]
    assert re.fullmatch(r"1,\d+ tokens|\d+,\d+ tokens", browser.value("document.querySelector('.when').textContent"))
    browser.point(1, 1)
    assert browser.value(loss) == at_end
    assert browser.problems == []
    assert browser.requests[before:] == [page.as_uri()]
