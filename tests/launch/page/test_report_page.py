"""The report's page: its text at any moment of a run, and its looks in a browser."""

import datetime
import json
import math
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from launch.page.chart import (
    LEFT,
    MAX_COLUMNS,
    MAX_DOTS,
    MEASURES,
    RIGHT,
    Axes,
    axis_labels,
    curve,
    smooth,
    thinned,
    ticks,
    value_range,
)
from launch.page.history import run_state, running_spans
from launch.page.markup import Html, element, html_page
from launch.page.report_page import MAX_SAMPLES, make_page
from tests.browser import Browser
from tests.peers import require_program
from train.config.config import to_json
from train.config.reading import make_config
from train.evaluation.documents import loop_documents
from train.evaluation.held_out import gzip_bits_per_byte
from train.run.folder import HeldOutDocument, Run

BEGIN = 1_790_000_000.0
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"&"


def event(at: float, name: str, **fields: object) -> dict:
    when = datetime.datetime.fromtimestamp(BEGIN + at, datetime.UTC).isoformat(timespec="milliseconds")
    return {"time": when, "event": name, "seconds": {}} | fields


def start(at: float, step: int, **fields: object) -> dict:
    return event(at, "start", step=step, host="node1", versions={"jax": "0.10.2"}, seconds={"init": 10.0}, **fields)


def record(step: int, evaluates: bool = False, **fields: object) -> dict:
    found = {
        "step": step, "time": BEGIN + step, "loss": 3 + 4 / step, "grad_norm": 1.0, "learning_rate": 1e-3,
        "loss_weight": 200.0, "utilization": 200 / 256, "tokens_per_second": 5000.0 + step % 7, "peak_share": 0.4,
        "data_wait_seconds": 0.001, "memory_bytes": 2**30,
    }  # fmt: skip
    evaluated = {
        "validation_loss": 3.0,
        "validation_bits_per_byte": 1.5 + 1 / step,
        "sample": f"step {step}: {HOSTILE}",
    }
    return found | (evaluated if evaluates else {}) | fields


def make_run(folder: Path, records: list[dict], events: list[dict], **config: dict) -> Run:
    """A run's folder with these lines, each log ending in a torn one."""
    run = Run(folder)
    folder.mkdir()
    values = {"data": {"segment_length": 32}, "train": {"num_steps": 300, "batch_size": 8}} | config
    run.config_file.write_text(to_json(make_config(values)))
    for path, lines in ((run.metrics, records), (run.events, events)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    return run


def whole(folder: Path) -> Run:
    """A run that was stopped, crashed, failed, rolled back and ended."""
    events = [
        start(0, 0), event(50, "save", step=50, stall_seconds=0.2), event(60, "stop", step=60, seconds={"init": 10.0}),
        start(100, 60), event(150, "save", step=150, stall_seconds=0.1, seconds={"steps": 40.0}),
        event(200, "crash", step=150, alive_until=BEGIN + 180), start(210, 150, commit="c" * 40 + "+"),
        event(220, "rollback", step=150, to=100, problem=HOSTILE, action="skip"),
        event(225, "skip", step=150, batches=1, rows=[{"batch": 0, "row": 0, "parts": [{"file": HOSTILE}]}]),
        event(230, "fault", error=f"ValueError: {HOSTILE}", seconds={}), start(240, 150),
        event(300, "end", step=300, seconds={"steps": 60.0}),
    ]  # fmt: skip
    return make_run(folder, [record(s, s == 1 or s % 50 == 0) for s in range(1, 301)], events)


def test_every_text_is_escaped_unless_it_is_markup_and_no_script_but_the_pages_runs():
    paragraph = element("p", HOSTILE, Html("<b>x</b>"), None, title=HOSTILE)
    assert paragraph.count("<") == paragraph.count(">") == 4
    page = html_page(HOSTILE, "", paragraph, {"a": HOSTILE}, "report")
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("<img") == 0
    assert "default-src 'none'" in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1]) == {"a": HOSTILE}
    assert html_page("", "", element("p", "\ud800"), None, "report").encode()


def test_a_page_tells_the_whole_run(tmp_path: Path):
    page = make_page(whole(tmp_path / "run"))
    for words in (
        ">finished<", "of 300", ">60,000<", "78.1% of positions give a loss", "4 starts", "goodput",
        "steps that were lost", "ValueError: &lt;/script&gt;", "jax 0.10.2", "commit cccccccccccc+", ">rollback<",
        "2 saves kept the steps waiting", "data.<wbr>segment_length", "step 150, 1.507 bits a byte", "21 Sep 2026",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("<figure data-chart") == len(MEASURES)
    assert page.count("<script") == 2
    assert "<img" not in page


def test_the_figures_of_a_page_are_of_the_same_texts_and_of_computed_steps(tmp_path: Path):
    # Few bytes of many documents are evaluated in the loop, and gzip has more trouble with those.
    texts = [HeldOutDocument("abcd " * 400) for _ in range(8)]
    passed_over = [record(s, loss=None, grad_norm=None, loss_weight=0.0, tokens_per_second=1.0) for s in range(2, 9)]
    records = [record(1, evaluates=True, tokens_per_second=4000.0), *passed_over]
    config = {"evaluation": {"loop_bytes": 1024, "max_bytes": 2**20}}
    run = make_run(tmp_path / "run", records, [start(0, 0)], **config)
    run.save_held_out(texts)
    page = make_page(run)
    of_loop = gzip_bits_per_byte(loop_documents(texts, run.load_config()))
    assert of_loop > 1.1 * gzip_bits_per_byte(texts)
    assert f">2.500<small>bits a byte; gzip -9 needs {of_loop:.3f}" in page
    assert ">4,000<small>tokens/s" in page
    last = record(9, evaluates=True, held_out_bits_per_byte=1.25, held_out_loss=2.0)
    run = make_run(tmp_path / "done", [*records, last], [start(0, 0), event(9, "end", step=9)], **config)
    run.save_held_out(texts)
    assert f">1.250<small>bits a byte; gzip -9 needs {gzip_bits_per_byte(texts):.3f}" in make_page(run)


def test_a_page_can_be_made_at_any_moment(tmp_path: Path):
    assert ">not started<" in make_page(make_run(tmp_path / "a", [], []))
    page = make_page(make_run(tmp_path / "b", [record(1)], [start(0, 0)]))
    assert ">crashed<" in page
    assert page.count("no evaluation yet") == 1
    slow = {"slowest_process": 3}
    running = make_run(tmp_path / "c", [record(s, **slow) for s in range(1, 101)], [start(0, 0)])
    running.lease.write_text("{}")
    page = make_page(running)
    assert ">running<" in page
    assert "process 3, in 100% of steps" in page
    # 200 steps of 256 positions at 5,002 tokens a second.
    assert re.search(r"<dt>left</dt><dd>10 s", page)
    older = [{name: value for name, value in record(s).items() if name not in ("time", "peak_share", "memory_bytes")}
             for s in range(1, 9)]  # fmt: skip
    page = make_page(make_run(tmp_path / "d", older, []))
    assert page.count("<figure data-chart") == len(MEASURES) - 3
    tasks = {"tasks": {"a/b": {"acc": 0.5, "acc_norm": 0.25}, HOSTILE: {"acc": 0.125}}}
    page = make_page(make_run(tmp_path / "g", [record(s) | (tasks if s % 4 == 0 else {}) for s in range(1, 9)], []))
    assert page.count("<figure data-chart") == len(MEASURES) - 1 + 3
    assert 'data-chart="tasks/a/b/acc_norm"' in page
    assert "<span>a/b <small>acc_norm</small></span><output>0.25</output>" in page
    load = {"expert_load_most": 1.75, "dead_experts": 2.0}
    page = make_page(make_run(tmp_path / "h", [record(s) | load for s in range(1, 9)], []))
    assert page.count("<figure data-chart") == len(MEASURES) - 1 + 2
    assert "<output>1.75</output>" in page
    fork = make_run(tmp_path / "f", [record(s) for s in range(5001, 5009)], [start(0, 5000)])
    path = re.search(r'<path class="line" d="M([\d.]+) ', make_page(fork))
    assert path is not None
    assert float(path[1]) < LEFT + (RIGHT - LEFT) / 7
    mixture = {"web": {"corpus": "web", "weight": [[0, 3], [100, 1]]}, "<code>": {"corpus": "code", "weight": 1}}
    page = make_page(make_run(tmp_path / "e", [], [], data={"corpus": mixture}))
    assert "75.0% of rows; 50.0% of rows from step 100" in page
    assert "&lt;code&gt;" in page
    (tmp_path / "e" / "config.json").write_text("{}x")
    with pytest.raises(InputError, match="no JSON"):
        make_page(Run(tmp_path / "e"))


def test_the_page_of_a_long_run_is_small_and_fast(tmp_path: Path):
    n = 100_000
    records = [record(s, s % 500 == 0) for s in range(1, n + 1)]
    records[70_000]["loss"] = math.nan
    events: list[dict] = []
    for begin in range(0, n, 250):
        events += [start(2 * begin, begin, pid=begin), *(event(2 * begin + 100 * k, "save", step=begin + 50 * k,
                   stall_seconds=0.1, seconds={"steps": 100.0 * k}) for k in range(1, 5)),
                   event(2 * begin + 480, "crash", step=begin + 200, alive_until=BEGIN + 2 * begin + 450)]  # fmt: skip
    run = make_run(tmp_path / "run", records, events, train={"num_steps": n, "batch_size": 8})
    begun = time.process_time()
    page = make_page(run)
    assert time.process_time() - begun < 30
    assert len(page) < 600_000
    assert "1 not finite" in page
    assert f"{MAX_SAMPLES} of 200 evaluations" in page
    assert "700 events are left out here" in page


@pytest.mark.parametrize(
    ("last", "is_alive", "word"),
    [
        (None, False, "not started"), (None, True, "starting"), ("start", True, "running"),
        ("save", True, "running"), ("rollback", True, "running"), ("crash", True, "starting"),
        ("end", True, "starting"), ("start", False, "crashed"), ("save", False, "crashed"),
        ("crash", False, "crashed"), ("stop", False, "stopped"), ("fault", False, "failed"),
        ("end", False, "finished"),
    ],
)  # fmt: skip
def test_the_last_event_and_a_sign_of_life_say_how_a_run_stands(last: str | None, is_alive: bool, word: str):
    assert run_state([event(0, last)] if last else [], is_alive, BEGIN)[1] == word


def test_the_line_of_time_has_what_ran_and_what_was_lost():
    # The save of step 70 was never complete: the next start found that of step 50.
    events = [
        start(100, 0), event(150, "save", step=50), event(170, "save", step=70),
        event(200, "crash", step=70, alive_until=BEGIN + 180), start(210, 50),
        event(260, "stop", step=90), start(310, 90), event(330, "save", step=100),
        event(345, "crash", step=100, alive_until=BEGIN + 330), start(360, 100),
    ]  # fmt: skip
    found = [(begin - BEGIN, end - BEGIN, name) for begin, end, name in running_spans(events, BEGIN + 370)]
    assert found == [(90, 150, "up"), (150, 180, "lost"), (200, 260, "up"), (300, 330, "up"), (350, 370, "up")]


def test_thinning_keeps_every_spike_and_a_line_is_broken_where_a_value_is_not_finite():
    x, y = np.arange(1, 50_001), np.zeros(50_000)
    y[[777, 31_313]] = 5.0, -5.0
    ends, kept = thinned(x, y)
    assert len(ends) <= MAX_COLUMNS
    assert len(kept) <= 3 * MAX_COLUMNS
    assert {777, 31_313, 49_999} <= set(kept.tolist())
    assert thinned(x[:1], y[:1])[1].tolist() == [0]
    axes = Axes(0, 4, 0.0, 1.0)
    values = np.array([0.0, 1.0, math.nan, 2.0, math.inf])
    assert re.sub(r"[\d. ]+", "", curve(axes, np.arange(5), values)) == "MLM"
    assert curve(axes, np.array([4]), np.array([9.0])) == "M394.0 8.0"
    assert np.isfinite(smooth(np.array([math.nan, 1.0, math.inf, 3.0]))).tolist() == [False, True, True, True]
    assert smooth(np.full(1000, 2.0)) == pytest.approx(2.0)


def test_axes_have_round_numbers_and_do_not_follow_a_few_spikes():
    assert ticks(0, 300, 5) == [0, 100, 200, 300]
    assert ticks(1.9, 7.2) == [2, 4, 6]
    # One number would say nothing of a scale.
    assert ticks(1.55, 2.41) == pytest.approx([1.6, 1.8, 2.0, 2.2, 2.4])
    assert axis_labels([0, 0.0005, 0.001]) == ["0", "0.0005", "0.001"]
    assert axis_labels([0, 10_000, 20_000]) == ["0", "10k", "20k"]
    assert axis_labels([2000, 4000]) == ["2000", "4000"]
    assert axis_labels([1.5, 1.5005, 1.501]) == ["1.5", "1.5005", "1.501"]
    assert axis_labels([0, 6e-6]) == ["0", "6e-6"]
    assert axis_labels([]) == []
    values = np.ones(1000)
    values[:100] = np.linspace(1, 3, 100)
    values[500] = 1000.0
    assert value_range(values, from_zero=False)[1] < 5
    assert value_range(values[:MAX_DOTS], from_zero=True)[0] == 0
    assert value_range(np.array([2.0, 2.0]), from_zero=False) == (1, 3)
    assert value_range(np.zeros(3), from_zero=True) == (0, 0.5)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require_program("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def colors(png: bytes) -> set[bytes]:
    """The different values of a picture's bytes, of one row of each fifty."""
    at, data = 8, b""
    width = struct.unpack(">I", png[16:20])[0]
    while at < len(png):
        length = struct.unpack(">I", png[at : at + 4])[0]
        data += png[at + 8 : at + 8 + length] * (png[at + 4 : at + 8] == b"IDAT")
        at += length + 12
    pixels = zlib.decompress(data)
    size = len(pixels) // struct.unpack(">I", png[20:24])[0]
    assert size >= 3 * width
    return {pixels[i : i + 4] for row in range(0, len(pixels), 50 * size) for i in range(row, row + size, 4)}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_it_fits_loads_nothing_and_shows_values_under_the_pointer(
    width: int, dark: bool, tmp_path: Path, browser: Browser
):
    page = tmp_path / "report.html"
    page.write_text(make_page(whole(tmp_path / "run")))
    before = len(browser.requests)
    browser.open(page, width, dark=dark)
    assert browser.value("document.documentElement.scrollWidth") <= width
    edges = browser.value("[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right)")
    assert max(edges) <= width
    drawn = browser.value("[...document.querySelectorAll('svg .line')].map(path => path.getTotalLength())")
    assert len(drawn) == len(MEASURES)
    assert min(drawn) > 100
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 128) == dark
    assert len(colors(browser.picture())) > 20

    last = browser.value("document.querySelector('output').textContent")
    box = browser.value("JSON.parse(JSON.stringify(document.querySelector('svg').getBoundingClientRect()))")
    browser.point(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert browser.value("document.querySelector('output').textContent") != last
    shown = browser.value("[...document.querySelectorAll('.when')].map(e => e.textContent)")
    assert all(re.fullmatch(r"step 1\d\d · \d+ Sep 2026 [\d:]+", text) for text in shown), shown
    browser.point(1, 1)
    assert browser.value("document.querySelector('output').textContent") == last
    assert browser.problems == []
    assert browser.requests[before:] == [page.as_uri()]
