"""HTML from Python: every text is escaped but what is markup already. And how the page looks and moves."""

import base64
import hashlib
import html
import json
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --text: #1f1f1f; --quiet: #67645e; --line: #e3e0da;
  --accent: #2355a0; --good: #2c7a3d; --warn: #9a6500; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #161718; --text: #e6e4e0; --quiet: #9d9a94; --line: #303234;
  --accent: #83b1f5; --good: #7fc98d; --warn: #e0b04a; --bad: #ff8f85; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word;
  font-variant-numeric: tabular-nums; }
@media (min-width: 40rem) { body { padding: 2.5rem 2rem 5rem; } }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; font-weight: 600; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.05rem; font-weight: 600; }
p { margin: .25rem 0; max-width: 46rem; }
.quiet, dt, th, figcaption small { color: var(--quiet); font-weight: 400; }
.state { font-weight: 600; }
.end { color: var(--good); } .stop { color: var(--warn); } .fault { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: 1rem 1.25rem;
  margin: 1.5rem 0 0; }
.figures dt { font-size: .8rem; } .figures dd { margin: 0; font-size: 1.15rem; line-height: 1.3; }
.figures small { display: block; font-size: .8rem; color: var(--quiet); }
.time { position: relative; height: 3.6rem; }
.time > * { position: absolute; }
.time .up, .time .lost { top: .5rem; height: .8rem; min-width: 1px; background: var(--accent); }
.time .lost { background: var(--bad); opacity: .55; }
.time .at { top: .2rem; height: 1.4rem; width: 0; border-left: 2px solid; margin-left: -1px; }
.time .at.many { height: .25rem; border-left-width: 1px; }
.time .tick { top: 2rem; font-size: .75rem; color: var(--quiet); border-left: 1px solid var(--line);
  padding-left: .3rem; white-space: nowrap; }
.time .rule { top: 1.8rem; left: 0; right: 0; border-top: 1px solid var(--line); }
.legend { font-size: .8rem; color: var(--quiet); } .legend span { margin-right: 1.2em; white-space: nowrap; }
.legend i { display: inline-block; margin-right: .45em; vertical-align: -.1em; width: 0; height: .9em;
  border-left: 2px solid; }
.legend i.save { height: .4em; vertical-align: .1em; } .legend i.block { width: .9em; height: .6em; border: 0;
  vertical-align: 0; background: var(--accent); } .legend i.lost { background: var(--bad); opacity: .55; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem 2rem;
  margin-top: .75rem; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
figcaption output { white-space: nowrap; }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; cursor: crosshair; overflow: visible; }
svg text { font-size: 11px; fill: var(--quiet); }
svg path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--line); } .raw { stroke: var(--accent); opacity: .4; }
.line { stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
.dots { stroke: var(--accent); stroke-width: 5; stroke-linecap: round; }
.cursor { stroke: var(--quiet); } .when { fill: var(--text); paint-order: stroke; stroke: var(--page);
  stroke-width: 5px; stroke-linejoin: round; }
.pointing .step { visibility: hidden; }
.mark { stroke-width: 1.2; opacity: .75; }
.mark { stroke: currentColor; } .mark.start { stroke-dasharray: 2 3; }
.mark.start, i.start, .at.start, .mark.save, i.save { color: var(--quiet); }
.none { aspect-ratio: 400 / 180; display: grid; place-items: center; color: var(--quiet);
  border: 1px solid var(--line); border-radius: 4px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 3rem; }
.columns > * { min-width: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-size: .8rem; } td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.bar { width: 35%; } .bar i { display: block; height: .55rem; margin-top: .4rem; min-width: 1px;
  background: var(--accent); }
td.bar i.not { background: var(--line); }
.events { list-style: none; margin: 0; padding: 0; font-size: .9rem; }
.events li { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .3rem 0; border-bottom: 1px solid var(--line); }
.events span:nth-child(4) { flex-basis: 100%; overflow-wrap: anywhere; color: var(--quiet); }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 2rem;
  margin: 0; font-size: .9rem; }
.settings > div { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0; min-width: 0;
  border-bottom: 1px solid var(--line); }
.settings dd { margin: 0; min-width: 0; text-align: right; overflow-wrap: anywhere; }
.settings small { display: block; color: var(--quiet); }
@media (min-width: 60rem) { .events li { display: grid; grid-template-columns: 11.5rem 4rem 6.5rem 1fr; } }
pre { margin: .25rem 0 0; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 4px;
  font: .82rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; margin: .75rem 0 .25rem; color: var(--accent); }
.samples { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.samples > * { min-width: 0; }
"""
# Where the pointer is over one chart, all of them show their values.
SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [left, right] = data.edges, [first, last] = data.between;
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; steps[middle] <= step ? low = middle : high = middle; }
  return step - steps[low] <= steps[high] - step ? low : high;
};
const figures = [...document.querySelectorAll("figure[data-chart]")].map(figure => ({
  svg: figure.querySelector("svg"), output: figure.querySelector("output"), cursor: figure.querySelector(".cursor"),
  when: figure.querySelector(".when"), ...data.charts[figure.dataset.chart],
}));
const show = step => {
  document.body.className = "pointing";
  for (const {cursor, when, output, steps, values} of figures) {
    const i = nearest(steps, step), x = left + (right - left) * (steps[i] - first) / (last - first);
    cursor.setAttribute("d", `M${x} ${data.top}V${data.bottom}`);
    output.textContent = values[i];
    const time = data.times[nearest(data.steps, steps[i])];
    when.textContent = `step ${steps[i].toLocaleString("en")}${time ? " · " + time : ""}`;
    when.setAttribute("x", Math.min(Math.max(x, left + 75), right - 75));
  }
};
const forget = () => {
  document.body.className = "";
  for (const {cursor, when, output, values} of figures) {
    cursor.setAttribute("d", ""); when.textContent = ""; output.textContent = values.at(-1);
  }
};
for (const {svg} of figures) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    show(first + Math.min(Math.max((x - left) / (right - left), 0), 1) * (last - first));
  });
  svg.addEventListener("pointerleave", forget);
}
"""


class Html(str):
    """Text that is markup."""


def tag(name: str, *inside: Any, **attributes: Any) -> Html:
    """An element. Texts inside it and values of attributes are escaped; none is left out.

    An attribute's name may end in _ where Python has the word, and stands with - for other _.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def join(parts: Any) -> Html:
    """Texts and elements one after the other; none is left out."""
    given = (part for part in parts if part is not None)
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in given))


def document(title: str, generator: str, body: Html, data: Any, script: str = SCRIPT, style: str = "") -> str:
    """A whole page. It may load nothing, and run no script but its own, which gets `data`; `style` is added to ours."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    # In a script's text only < could end it.
    numbers = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (
        f"<!doctype html>\n{generator}\n"
        + tag(
            "html",
            tag(
                "head",
                Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
                Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
                # Else a browser asks for an icon.
                Html('<link rel="icon" href="data:,">'),
                tag("title", title),
                tag("style", Html(STYLE + style)),
            ),
            tag(
                "body",
                body,
                tag("script", Html(numbers), type="application/json", id="data"),
                tag("script", Html(script)) if data else None,
            ),
            lang="en",
        )
        + "\n"
    )
    # What JSON can hold and UTF-8 can't.
    return page.encode(errors="replace").decode()
