"""The page of a run: how it stands, its charts, its time, its settings, its data and its samples.

It is made from the run's folder alone, at any moment of the run.
"""

import collections
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.config import stages, weight_at
from launch.page.chart import BOTTOM, LEFT, MEASURES, RIGHT, TOP, Chart, between, columns, draw, task_measures
from launch.page.history import (
    legend,
    line_of_time,
    listing,
    marks,
    moment,
    seconds_of,
    short_duration,
    state,
    stretches,
)
from launch.page.markup import Html, document, join, tag
from train.config.config import Config, config_fields, to_json
from train.evaluation.documents import some_of
from train.evaluation.held_out import gzip_bits_per_byte
from train.run.events import read_events
from train.run.folder import Run
from train.run.goodput import duration, goodput
from train.run.lease import BEAT_SECONDS, PATIENCE
from train.run.step_log import read_steps, scalars
from train.step.schedule import batch_size

# The first line after the doctype: by it a page is known as one that may be written over.
GENERATOR = "<!-- ziggurat report -->"
# Evaluations whose samples are shown, and characters of each.
SAMPLES, SAMPLE_CHARACTERS = 12, 2000
KINDS = {
    "steps": "steps that count", "data": "waiting for data", "evaluation": "evaluation and samples",
    "checkpoint": "saves", "compile": "compiling", "init": "before the first step", "lost": "steps that were lost",
    "down": "nothing ran",
}  # fmt: skip


def make_page(run: Run) -> str:
    """The whole page. InputError where the folder is no run, or its config is damaged."""
    config = run.load_config()
    records = [record | dict(scalars({"tasks": record.get("tasks", {})})) for _, record in read_steps(run.metrics)]
    measures = (*MEASURES, *task_measures(records))
    events, now, beat = read_events(run.events), time.time(), last_beat(run)
    is_alive = now - beat < PATIENCE * BEAT_SECONDS
    seen = max([beat, *(record.get("time", 0.0) for record in records[-1:])])
    color, word, more = state(events, is_alive, seen)
    spent, at, ran = goodput(events), marks(events), stretches(events, now if is_alive else seen)
    drawn = {measure.field: draw(measure, records, at, missing(config, measure.field)) for measure in measures}
    charts = {field: chart for field, chart in drawn.items() if chart and records}
    header = tag(
        "header",
        tag("h1", run.folder),
        tag("p", tag("span", word, class_=f"state {color}"), " ", tag("span", more, class_="quiet")),
        figures(config, run, records, events, is_running=word == "running"),
    )
    sections = (
        section("Time", line_of_time(events, ran), legend(at, any(name == "lost" for *_, name in ran)))
        if events
        else None,
        section("Steps", tag("div", *(chart.figure for chart in charts.values()), class_="charts")) if charts else None,
        tag(
            "div",
            section("Goodput", goodput_table(spent), until(events)) if events else None,
            section("Data", data_table(config, records)),
            class_="columns",
        ),
        section("Samples", samples(records)),
        section("What happened", listing(events)) if events else None,
        section("Settings", settings(config)),
        tag("p", f"Made {moment(now)} UTC by ziggurat report.", class_="quiet"),
    )
    data = readouts(charts, records) if charts else None
    return document(f"{run.folder.name}: {word}", GENERATOR, join([header, *sections]), data)


def last_beat(run: Run) -> float:
    """When whoever holds the run last showed that it lived (seconds since 1970); 0: nobody holds it."""
    try:
        return run.lease.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def section(title: str, *inside: Html) -> Html:
    """A part of the page under its title."""
    return tag("section", tag("h2", title), *inside)


def missing(config: Config, field: str) -> str:
    """What stands in place of a chart that has no points yet; nothing where it will never have any."""
    return "no evaluation yet" if field.startswith("validation") and config.data.validation_fraction else ""


def readouts(charts: Mapping[str, Chart], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page's script needs: the values of all charts, and when the steps were."""
    x = np.array([record["step"] for record in records])
    steps = columns(x, x)[0].tolist()
    return {
        "edges": [LEFT, RIGHT], "top": TOP, "bottom": BOTTOM, "between": between(records),
        "steps": [records[i]["step"] for i in steps],
        "times": [moment(records[i]["time"]) if "time" in records[i] else "" for i in steps],
        "charts": {field: {"steps": c.steps, "values": c.values} for field, c in charts.items() if c.steps},
    }  # fmt: skip


def figures(
    config: Config,
    run: Run,
    records: Sequence[Mapping[str, Any]],
    events: Sequence[dict[str, Any]],
    is_running: bool,
) -> Html:
    """The numbers that are asked for first."""
    found: list[tuple[str, Any, Any]] = []
    step = records[-1]["step"] if records else 0
    found.append(("step", f"{step:,}", f"of {config.train.num_steps:,}"))
    if is_running and records:
        rows = sum(batch_size(config, s) for s in range(step, config.train.num_steps))
        left = rows * config.data.segment_length / max(records[-1]["tokens_per_second"], 1e-9)
        found.append(("left", duration(left), "of steps, at the last rate"))
    if records:
        tokens = sum(record["loss_weight"] for record in records)
        found.append(("trained on", f"{tokens:,.0f}", "tokens"))
        found.append(("training loss", f"{records[-1]['loss']:.4f}", "nats a token"))
    evaluated = [record for record in records if "validation_bits_per_byte" in record]
    if evaluated:
        last, texts = evaluated[-1], run.held_out_texts()
        if not any(event["event"] == "end" and event["step"] == last["step"] for event in events):
            texts = some_of(texts, config.evaluation.loop_bytes)  # as the run itself does on the way
        gzip = f"; gzip -9 needs {gzip_bits_per_byte(texts):.3f}" if texts else ""
        found.append(("held-out text", f"{last['validation_bits_per_byte']:.3f}", f"bits a byte{gzip}"))
    if records:
        rates = sorted(record["tokens_per_second"] for record in records)
        peaks = sorted(record["peak_share"] for record in records if "peak_share" in record)
        share = f"{peaks[len(peaks) // 2]:.1%} of the peak, " if peaks else ""
        found.append(("throughput", f"{rates[len(rates) // 2]:,.0f}", f"tokens/s, {share}median"))
    if spent := goodput(events):
        whole = sum(spent.values())
        found.append(("goodput", f"{spent['steps'] / max(whole, 1e-9):.0%}", f"of {duration(whole)}"))
        starts = sum(event["event"] == "start" for event in events)
        began = seconds_of(events[0]) - sum(events[0].get("seconds", {}).values())
        found.append(("began", moment(began)[:-9], f"{moment(began)[-8:]} UTC; {starts:,} start{'s' * (starts > 1)}"))
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value, tag("small", more))) for name, value, more in found),
        class_="figures",
    )


def goodput_table(spent: Mapping[str, float]) -> Html:
    """Where the time has gone."""
    whole = max(sum(spent.values()), 1e-9)
    rows = (
        tag(
            "tr",
            tag("td", KINDS.get(kind, kind)),
            tag("td", short_duration(seconds), class_="number"),
            tag("td", f"{seconds / whole:.1%}", class_="number"),
            tag("td", tag("i", style=f"width:{100 * seconds / whole:.1f}%"), class_="bar"),
        )
        for kind, seconds in spent.items()
    )
    return tag("table", *rows)


def until(events: Sequence[dict[str, Any]]) -> Html:
    """What an account of the time knows."""
    return tag("p", f"Until {moment(seconds_of(events[-1]))} UTC, when the run last wrote it down.", class_="quiet")


def data_table(config: Config, records: Sequence[Mapping[str, Any]]) -> Html:
    """The corpora, and how the positions of the segments are used."""
    corpus = config.data.corpus
    mixture = corpus if isinstance(corpus, dict) else {"": {"corpus": corpus}}
    weights = {name: stages(values.get("weight", 1.0)) for name, values in mixture.items()}
    changes = sorted({step for of_corpus in weights.values() for step, _ in of_corpus})
    evaluated = [record["validation_by_corpus"] for record in records if "validation_by_corpus" in record]
    by_corpus = evaluated[-1] if evaluated else {}
    rows = []
    for name, values in mixture.items():
        shares = [weight_at(s, weights[name]) / sum(weight_at(s, w) for w in weights.values()) for s in changes]
        told = [values["corpus"]]
        if name:
            told += [f"{share:.1%} of rows" + (f" from step {step:,}" if step else "")
                     for step, share in zip(changes, shares, strict=True)]  # fmt: skip
        if epochs := values.get("epochs", config.data.epochs):
            told.append(f"read {epochs} times at most")
        if name in by_corpus:
            told.append(f"{by_corpus[name]['validation_bits_per_byte']:.3f} bits a byte held out")
        rows.append((name or "corpus", "; ".join(told)))
    rows.append(("a step", f"{config.train.batch_size:,} rows of {config.data.segment_length:,} positions"))
    if records:
        positions = sum(record["loss_weight"] / max(record["utilization"], 1e-9) for record in records)
        tokens = sum(record["loss_weight"] for record in records)
        waited = sum(record["data_wait_seconds"] for record in records)
        rows.append(("utilisation", f"{tokens / max(positions, 1e-9):.1%} of positions give a loss"))
        rows.append(("waiting", f"{waited / len(records):.3f} s a step"))
        slowest = collections.Counter(r["slowest_process"] for r in records if "slowest_process" in r)
        for process, steps in slowest.most_common(1):
            rows.append(("slowest", f"process {process}, in {steps / slowest.total():.0%} of steps"))
    return tag("table", *(tag("tr", tag("th", name), tag("td", value)) for name, value in rows))


def samples(records: Sequence[Mapping[str, Any]]) -> Html:
    """What the model wrote over time: of many evaluations some, the first and the last among them."""
    found = [record for record in records if "sample" in record]
    if not found:
        return tag("p", "No evaluation yet.", class_="quiet")
    count = min(SAMPLES, len(found))
    chosen = sorted({round(i * (len(found) - 1) / max(count - 1, 1)) for i in range(count)})
    told = tag("p", f"{count} of {len(found):,} evaluations.", class_="quiet") if count < len(found) else None
    texts = (
        tag(
            "div",
            tag("p", f"step {record['step']:,}, {record['validation_bits_per_byte']:.3f} bits a byte", class_="quiet"),
            tag("pre", record["sample"][:SAMPLE_CHARACTERS]),
        )
        for record in (found[i] for i in chosen)
    )
    return join([told, tag("div", *texts, class_="samples")])


def settings(config: Config) -> Html:
    """What is other than its default, or has been derived; and everything."""
    rows = []
    for group, name, setting in config_fields():
        value = getattr(getattr(config, group), name)
        default = setting.default_factory() if callable(setting.default_factory) else setting.default
        if value != default:
            usual = tag("small", f"{_text(default)} by default")
            rows.append(tag("div", tag("dt", group, ".", Html("<wbr>"), name), tag("dd", _text(value), " ", usual)))
    everything = tag("details", tag("summary", "all settings"), tag("pre", to_json(config)))
    return join([tag("dl", *rows, class_="settings"), everything])


def _text(value: Any) -> str:
    is_plain = isinstance(value, str) and value == value.strip() != ""
    return value if is_plain else "none" if value is None else json.dumps(value, ensure_ascii=False)
