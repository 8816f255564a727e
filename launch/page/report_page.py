"""The page of a run: its state, charts, time, data, samples and settings, made from the run's folder at any moment."""

import collections
import contextlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.config import stages, weight_at
from launch.page import history
from launch.page.chart import (
    BOTTOM,
    EXPERT_MEASURES,
    LEFT,
    MEASURES,
    PAIR_MEASURES,
    RIGHT,
    SAMPLE_MEASURES,
    TOP,
    Chart,
    Measure,
    make_chart,
    step_range,
    task_measures,
    thinned,
)
from launch.page.markup import Html, element, fragment, html_page
from train.config.config import Config, config_fields, public, to_json
from train.evaluation.documents import loop_documents
from train.evaluation.held_out import gzip_bits_per_byte
from train.run.events import read_events
from train.run.folder import Run
from train.run.goodput import duration, goodput
from train.run.lease import BEAT_SECONDS, MISSING_BEATS
from train.run.step_log import held_out_figure, median_rate, read_metrics, scalars, trained_tokens
from train.step.schedule import rows_between

# By this comment a later report recognizes a page that it may replace.
GENERATOR = "<!-- ziggurat report -->"
MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 2000
# Kind of activity in the account of time → its name in the page.
ACTIVITIES = {
    "steps": "steps that count", "data": "waiting for data", "evaluation": "evaluation and samples",
    "checkpoint": "saves", "compile": "compiling", "init": "before the first step", "lost": "steps that were lost",
    "down": "nothing ran",
}  # fmt: skip
Records = Sequence[Mapping[str, Any]]


def make_page(run: Run) -> str:
    """Returns the whole page. Raises InputError where the folder is no run, or its config is damaged."""
    config = public(run.load_config())
    records = [record | dict(scalars({"tasks": record.get("tasks", {})})) for record in read_metrics(run.metrics)]
    events = read_events(run.events)
    now, beat = time.time(), 0.0
    # A process that holds the run renews its lease.
    with contextlib.suppress(FileNotFoundError):
        beat = run.lease.stat().st_mtime
    is_alive = now - beat < MISSING_BEATS * BEAT_SECONDS
    last_seen = max([beat, *(record.get("time", 0.0) for record in records[-1:])])
    color, word, detail = history.run_state(events, is_alive, last_seen)
    marks = history.event_steps(events)
    charts: dict[str, Chart] = {}
    for measure in (*measures_of(config), *EXPERT_MEASURES, *task_measures(records)) if records else ():
        will_come = measure.field.startswith("validation") and config.data.validation_fraction
        if chart := make_chart(measure, records, marks, "no evaluation yet" if will_come else ""):
            charts[measure.field] = chart
    state = element("p", element("span", word, class_=f"state {color}"), " ", element("span", detail, class_="quiet"))
    figures = key_figures(config, run, records, events, is_running=word == "running")
    parts = [element("header", element("h1", run.folder), state, figures)]
    if events:
        spans = history.running_spans(events, now if is_alive else last_seen)
        has_lost = any(name == "lost" for *_, name in spans)
        parts.append(section("Time", history.time_axis(events, spans), history.legend(marks, has_lost)))
    if charts:
        parts.append(section("Steps", element("div", *(chart.figure for chart in charts.values()), class_="charts")))
    time_spent = section("Goodput", *goodput_table(events)) if events else None
    parts.append(element("div", time_spent, section("Data", data_table(config, records)), class_="columns"))
    parts.append(section("Samples", samples(records)))
    if events:
        parts.append(section("What happened", history.event_list(events)))
    parts.append(section("Settings", changed_settings(config)))
    parts.append(element("p", f"Made {history.utc_text(now)} UTC by ziggurat report.", class_="quiet"))
    data = readouts(charts, records) if charts else None
    return html_page(f"{run.folder.name}: {word}", GENERATOR, fragment(parts), data, "report", has_cursors=True)


def measures_of(config: Config) -> list[Measure]:
    """Returns what is charted of a run with any model, the training loss first."""
    if config.objective.samples:
        return [*MEASURES[:1], *SAMPLE_MEASURES, *MEASURES[1:]]
    if not config.objective.compares:
        return [*MEASURES]
    loss, *others = MEASURES
    if config.model.reward_head:
        others = [measure for measure in others if measure.field != "validation_bits_per_byte"]
    return [replace(loss, unit="nats a pair"), *PAIR_MEASURES, *others]


def section(title: str, *inside: Html) -> Html:
    """Returns a part of the page under its title."""
    return element("section", element("h2", title), *inside)


def readouts(charts: Mapping[str, Chart], records: Records) -> dict[str, Any]:
    """Returns the data of the page's script: the values of all charts, and the times of the steps."""
    x = np.array([record["step"] for record in records])
    shown = [records[i] for i in thinned(x, x)[0].tolist()]
    return {
        "edges": [LEFT, RIGHT], "top": TOP, "bottom": BOTTOM, "between": step_range(records),
        "steps": [record["step"] for record in shown],
        "times": [history.utc_text(record["time"]) if "time" in record else "" for record in shown],
        "charts": {field: {"steps": c.steps, "values": c.values} for field, c in charts.items() if c.steps},
    }  # fmt: skip


def key_figures(config: Config, run: Run, records: Records, events: Sequence[history.Event], is_running: bool) -> Html:
    """Returns the most important numbers as a list of (name, value, detail)."""
    step = records[-1]["step"] if records else 0
    figures = [("step", f"{step:,}", f"of {config.train.num_steps:,}")]
    if is_running and records:
        rows = rows_between(config, step, config.train.num_steps)
        left = rows * config.data.segment_length / max(records[-1]["tokens_per_second"], 1e-9)
        limit = "at most, " if config.data.epochs else "of steps, "
        figures.append(("left", duration(left), f"{limit}at the last rate"))
    if records:
        tokens = sum(map(trained_tokens, records))
        figures.append(("trained on", f"{tokens:,.0f}", "tokens"))
        losses = [record["loss"] for record in records if record["loss"] is not None]
        if losses:
            figures.append(("training loss", f"{losses[-1]:.4f}", measures_of(config)[0].unit))
    if evaluated := [record for record in records if "validation_bits_per_byte" in record]:
        last, texts = evaluated[-1], run.held_out_texts()
        if not any(event["event"] == "end" and event["step"] == last["step"] for event in events):
            # Only at a run's end there is a figure of all texts.
            texts = loop_documents(texts, config)
        gzip = f"; gzip -9 needs {gzip_bits_per_byte(texts):.3f}" if texts else ""
        figures.append(("held-out text", f"{held_out_figure(last, 'bits_per_byte'):.3f}", f"bits a byte{gzip}"))
    if compared := [record for record in records if "validation_preference_accuracy" in record]:
        pairs = f"of {held_out_figure(compared[-1], 'pairs'):,.0f} in the right order"
        figures.append(("held-out pairs", f"{held_out_figure(compared[-1], 'preference_accuracy'):.1%}", pairs))
    if records:
        peaks = [record["peak_share"] for record in records if "peak_share" in record]
        share = f"{statistics.median_high(peaks):.1%} of the peak, " if peaks else ""
        figures.append(("throughput", f"{median_rate(records):,.0f}", f"tokens/s, {share}median"))
    if spent := goodput(events):
        total = sum(spent.values())
        figures.append(("goodput", f"{spent['steps'] / max(total, 1e-9):.0%}", f"of {duration(total)}"))
        starts = sum(event["event"] == "start" for event in events)
        began = history.utc_text(history.seconds_of(events[0]) - sum(events[0].get("seconds", {}).values()))
        figures.append(("began", began[:-9], f"{began[-8:]} UTC; {starts:,} start{'s' * (starts > 1)}"))
    entries = (
        element("div", element("dt", name), element("dd", value, element("small", detail)))
        for name, value, detail in figures
    )
    return element("dl", *entries, class_="figures")


def goodput_table(events: Sequence[history.Event]) -> tuple[Html, Html]:
    """Returns a table of a run's time by activity, and a note of when the run last recorded it."""
    spent = goodput(events)
    total = max(sum(spent.values()), 1e-9)
    rows = []
    for kind, seconds in spent.items():
        share = seconds / total
        numbers = (history.short_duration(seconds), f"{share:.1%}")
        cells = (element("td", number, class_="number") for number in numbers)
        bar = element("td", element("i", style=f"width:{100 * share:.1f}%"), class_="bar")
        rows.append(element("tr", element("td", ACTIVITIES.get(kind, kind)), *cells, bar))
    note = f"Until {history.utc_text(history.seconds_of(events[-1]))} UTC, when the run last wrote it down."
    return element("table", *rows), element("p", note, class_="quiet")


def data_table(config: Config, records: Records) -> Html:
    """Returns a table of the corpora, and of how the positions of the segments are used."""
    rows = corpus_rows(config, records)
    rows.append(("a step", f"{config.train.batch_size:,} rows of {config.data.segment_length:,} positions"))
    if records:
        positions = sum(trained_tokens(record) / max(record["utilization"], 1e-9) for record in records)
        tokens = sum(map(trained_tokens, records))
        waited = sum(record["data_wait_seconds"] for record in records)
        rows.append(("utilisation", f"{tokens / max(positions, 1e-9):.1%} of positions give a loss"))
        rows.append(("waiting", f"{waited / len(records):.3f} s a step"))
        slowest = collections.Counter(r["slowest_process"] for r in records if "slowest_process" in r)
        for process, steps in slowest.most_common(1):
            rows.append(("slowest", f"process {process}, in {steps / slowest.total():.0%} of steps"))
    return element("table", *(element("tr", element("th", name), element("td", value)) for name, value in rows))


def corpus_rows(config: Config, records: Records) -> list[tuple[str, str]]:
    """Returns (name, description) of each corpus of the run."""
    corpus = config.data.corpus
    mixture = corpus if isinstance(corpus, dict) else {"": {"corpus": corpus}}
    weights = {name: stages(values.get("weight", 1.0)) for name, values in mixture.items()}
    changes = sorted({step for of_corpus in weights.values() for step, _ in of_corpus})
    evaluated = [record["validation_by_corpus"] for record in records if "validation_by_corpus" in record]
    by_corpus = evaluated[-1] if evaluated else {}
    rows = []
    for name, values in mixture.items():
        details = [values["corpus"] or "none"]
        for step in changes if name else ():
            share = weight_at(step, weights[name]) / sum(weight_at(step, w) for w in weights.values())
            details.append(f"{share:.1%} of rows" + (f" from step {step:,}" if step else ""))
        if epochs := values.get("epochs", config.data.epochs):
            details.append(f"read {epochs} times at most")
        if name in by_corpus:
            details.append(f"{by_corpus[name]['validation_bits_per_byte']:.3f} bits a byte held out")
        rows.append((name or "corpus", "; ".join(details)))
    return rows


def samples(records: Records) -> Html:
    """Returns the model's texts over time, of evaluations evenly apart, the first and the last included."""
    evaluated = [record for record in records if record.get("sample")]
    if not evaluated:
        return element("p", "No sample yet.", class_="quiet")
    count = min(MAX_SAMPLES, len(evaluated))
    note = element("p", f"{count} of {len(evaluated):,} evaluations.", class_="quiet")
    texts = []
    for i in np.linspace(0, len(evaluated) - 1, count).round().astype(int):
        record = evaluated[i]
        title = f"step {record['step']:,}, {record['validation_bits_per_byte']:.3f} bits a byte"
        text = element("pre", record["sample"][:MAX_SAMPLE_CHARACTERS])
        texts.append(element("div", element("p", title, class_="quiet"), text))
    return fragment([note if count < len(evaluated) else None, element("div", *texts, class_="samples")])


def changed_settings(config: Config) -> Html:
    """Returns the settings that differ from their defaults, those that were derived included, and below all of them."""
    rows = []
    for group, name, setting in config_fields():
        value = getattr(getattr(config, group), name)
        default = setting.default_factory() if callable(setting.default_factory) else setting.default
        if value != default:
            usual = element("small", f"{setting_text(default)} by default")
            field = element("dt", group, ".", Html("<wbr>"), name)
            rows.append(element("div", field, element("dd", setting_text(value), " ", usual)))
    everything = element("details", element("summary", "all settings"), element("pre", to_json(config)))
    return fragment([element("dl", *rows, class_="settings"), everything])


def setting_text(value: Any) -> str:
    """Returns a setting as text: words as they are, all else as JSON."""
    if value is None:
        return "none"
    is_plain = isinstance(value, str) and value == value.strip() != ""
    return value if is_plain else json.dumps(value, ensure_ascii=False)
