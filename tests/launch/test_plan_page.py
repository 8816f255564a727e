"""`ziggurat plan --html`: the page of a plan, and where it may stand."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.page.lanes import Block, lanes_chart, merged
from launch.page.roofline import Point, decades, roofline_chart
from launch.plan_page import label, peak_parts, with_depth
from tests.browser import Browser
from tests.launch.small_run import here, write_config
from tests.launch.test_search import plan_of
from tests.peers import require, require_program
from train.planning.plan import Plan
from train.planning.roofline import Work
from train.planning.timeline import Interval


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag of a small config."""
    return f"--config={write_config(tmp_path_factory.mktemp('config'))}"


@pytest.fixture(scope="module")
def page(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan for this machine's eight devices."""
    file = tmp_path_factory.mktemp("page") / "new folder" / "plan.html"
    assert here("plan", config, f"--html={file}", "--price=2") == 0
    return file


def test_a_plan_has_a_page_that_loads_nothing_and_standard_output_stays_as_it_is(page: Path, config: str, capsys):
    text = page.read_text()
    for words in (
        ">fits<", "Memory of a device", "the optimizer&#x27;s state", "Time of a step", "model FLOPs at the chip",
        "Timeline of a step", ">links over fsdp<", "Roofline", "Largest operations", "Communication of a device",
        "all-gather over fsdp", "at $2 a device-hour", "model.<wbr>num_layers",
    ):  # fmt: skip
        assert words in text, words
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"data:,"}
    assert text.count("<script") == 1  # the data, which is null
    assert here("plan", config, f"--html={page}", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"{plan['tokens_per_second']:,.0f}" in page.read_text()


def test_the_page_of_a_run_has_its_own_figures(finished: Path, tmp_path: Path, capsys):
    assert here("plan", finished, f"--html={tmp_path / 'plan.html'}") == 0
    table = capsys.readouterr().out.partition("\n\n")[2].strip()
    assert "steady steps" in table
    assert table.splitlines()[2] in (tmp_path / "plan.html").read_text()


def test_a_step_that_does_not_fit_has_a_page_that_says_so(config: str, tmp_path: Path):
    require("libtpu")
    file = tmp_path / "plan.html"
    flags = [config, "--topology=v5e:2x2", "--config.train.batch_size=16777216"]
    assert here("plan", *flags, f"--html={file}") == 0
    text = file.read_text()
    assert ">does not fit<" in text
    assert "exceeds available HBM (15.75G)" in text
    assert 'class="limit"' in text
    assert "Timeline" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--html={dir}/other.html"], "other.html exists and is no page of a plan; name another file with --html=FILE"),
        (["--html={dir}"], "exists and is no page of a plan"),
        (["--html={dir}/other.html/plan.html"], "other.html is a file; name another path"),
        (["--html={dir}/plan.html", "--search", "--topology=v5e:2x2"], "plan.html goes with one plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_other_file_is_replaced_and_that_is_said_before_anything_is_compiled(
    flags: list[str], words: str, config: str, tmp_path: Path, monkeypatch, capsys
):
    (tmp_path / "other.html").write_text("<!doctype html>\n<!-- ziggurat report -->")
    monkeypatch.setattr("train.planning.compilation.compile_step", None)
    assert here("plan", config, *(flag.format(dir=tmp_path) for flag in flags)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert (tmp_path / "other.html").read_text().endswith("report -->")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_parts_of_the_bar_add_up_to_the_peak():
    memory = {"weights": 40, "optimizer": 80, "batch": 1, "temporaries": 100, "output": 500, "aliased": 500, "code": 7}
    plan = Plan(**plan_of(1.0) | {"memory": memory, "peak_bytes_per_device": 230})
    assert peak_parts(plan) == {"weights": 40, "optimizer": 80, "batch": 1, "other": 9, "temporaries": 100}


def test_neighbours_too_narrow_to_be_seen_are_one_block():
    blocks = [Block("a", "x", f"{i}", i / 1000, (i + 1) / 1000) for i in range(500)]
    wide, other = Block("a", "x", "wide", 0.5, 0.8), Block("a", "y", "other", 0.8, 0.8001)
    alone = Block("a", "x", "alone", 0.9, 0.9001)
    found = merged([alone, other, wide, *blocks], 1 / 100)
    assert [block.title for block in found] == ["500 short operations", "wide", "other", "alone"]
    assert (found[0].start, found[0].end) == (0.0, 0.5)
    chart = lanes_chart([wide, *merged(blocks, 1 / 100)], 1.0, [(0.0, "0")], "a & b")
    assert chart.count("<i ") == 2
    assert "left:50.000%;width:30.000%" in chart
    assert 'aria-label="a &amp; b"' in chart


def test_loops_stand_below_the_loops_around_them():
    outer, later = Interval("loop", "outer", 0.0, 10.0, 2), Interval("loop", "later", 11.0, 12.0, 2)
    inner, first = Interval("loop", "inner", 4.0, 10.0, 3), Interval("loop", "first", 0.0, 4.0, 3)
    assert [(at.name, depth) for at, depth in with_depth([first, inner, outer, later])] == [
        ("outer", 0), ("later", 0), ("first", 1), ("inner", 1)
    ]  # fmt: skip


def test_a_roofline_has_its_corner_where_peak_and_bandwidth_meet():
    chart = roofline_chart([Point("p", 100.0, 1e12, 0.25)], 1e14, 1e12, "")
    # From 10 to 1,000 FLOPs a byte and from 1 to 100 TFLOP/s: the corner is in the middle of the width, at the top.
    assert 'd="M46.0 82.0L220.0 8.0H394"' in chart
    assert 'cx="220.0" cy="156.0" r="8.0"' in chart
    assert decades([5.0, 2000.0]) == (0, 4)
    assert decades([1e-9, 2.0]) == (-5, 1)
    slowest = roofline_chart([Point("p", 100.0, 1e2, 0.25)], 1e14, 1e12, "")
    assert 'cy="156.0"' in slowest, "an operation slower than the chart's floor is drawn below it"


def test_an_operation_has_the_name_of_what_was_traced_and_its_pass():
    def text(source: str) -> str:
        return label(Work("fusion.1", source, 1, 1.0, 1.0, 1.0))

    assert text("jit(step)/while/body/jvp()/btd,df->btf/dot_general") == "btd,df->btf, forward"
    assert text("jit(step)/transpose(jvp())/checkpoint/btd,df->btf/dot_general") == "btd,df->btf, backward"
    assert text("jit(step)/transpose(jvp())/rematted_computation/mul") == "mul, recomputed"
    assert text("jit(step)/sqrt") == "sqrt"
    assert text("") == "fusion.1"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require_program("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_it_fits_and_loads_nothing(width: int, page: Path, tmp_path: Path, browser: Browser):
    copy = Path(shutil.copy(page, tmp_path / "plan.html"))
    before = len(browser.requests)
    browser.open(copy, width, dark=width < 400)
    assert browser.value("document.documentElement.scrollWidth") <= width

    def widths(selector: str) -> list[float]:
        return browser.value(f"[...document.querySelectorAll('{selector}')].map(e => e.getBoundingClientRect().width)")

    lanes = widths(".lanes > div:not(.axis)")
    assert min(lanes) > width / 2
    assert sum(widths(".lanes i.compute")) > min(lanes) / 10
    assert len(widths("circle.point")) > 3
    assert browser.problems == []
    assert browser.requests[before:] == [copy.as_uri()]
