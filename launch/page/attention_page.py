"""The page of a model's attention over a text: a grid of heads, one of them large, and what each token looks at."""

import base64
from collections.abc import Sequence

import numpy as np

from launch.page.markup import Html, document, tag

# The first line after the doctype: by it a page is known as one that may be written over.
GENERATOR = "<!-- ziggurat attention -->"
# Of all weights, a byte each; in the page they take a third more.
MOST_BYTES = 12 * 2**20
# Tokens that are few enough to be named beside the large head, on a wide page and on a phone.
NAMED, NAMED_ON_PHONE = 40, 24
# Heads of a layer that leave room for a large one beside the grid.
SIDE_BY_SIDE = 12
STYLE = """
.look { display: grid; gap: 0 3rem; grid-template-columns: minmax(0, 1fr); }
.look > * { min-width: 0; }
.heads { display: grid; gap: 3px; overflow: auto; max-height: 60vh; padding: 3px; }
.heads span { color: var(--quiet); font-size: .75rem; align-self: center; justify-self: center; }
.heads button { padding: 0; border: 1px solid var(--line); background: none; cursor: pointer; aspect-ratio: 1;
  min-width: 0; }
.heads.fine canvas { image-rendering: auto; }
.heads button:hover { border-color: var(--quiet); }
.heads button[aria-pressed=true] { outline: 2px solid var(--accent); border-color: var(--accent); }
canvas { display: block; width: 100%; height: 100%; image-rendering: pixelated; }
.tokens { display: flex; flex-wrap: wrap; gap: 3px; margin: .5rem 0 1rem; max-height: 14rem; overflow: auto;
  padding: 3px; }
.tokens button { font: .85rem/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: inherit;
  padding: .15rem .3rem; border: 1px solid var(--line); border-radius: 3px; cursor: pointer; white-space: pre;
  background: color-mix(in srgb, var(--accent) calc(var(--weight, 0) * 55%), transparent); max-width: 100%;
  overflow: hidden; text-overflow: ellipsis; min-width: 2.1rem; }
.tokens button[aria-pressed=true] { outline: 2px solid var(--accent); }
.tokens small { display: block; font: .7rem/1.2 system-ui, sans-serif; color: var(--quiet); min-height: .84rem; }
.tokens button.later { opacity: .45; }
.map { display: grid; grid-template: auto auto / auto minmax(0, 1fr); max-width: 34rem; }
.map .field { position: relative; grid-area: 2 / 2; aspect-ratio: 1; border: 1px solid var(--line); cursor: crosshair;
  touch-action: pan-y; }
.field i { position: absolute; pointer-events: none; border: solid var(--text); opacity: .55; }
.field .row { left: 0; right: 0; border-width: 1px 0; } .field .column { top: 0; bottom: 0; border-width: 0 1px; }
.names { display: flex; font: .65rem/1 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--quiet); }
.names span { flex: 1 1 0; min-height: 0; min-width: 0; display: flex; align-items: center; overflow: hidden; }
.names b { font-weight: 400; white-space: pre; overflow: hidden; text-overflow: ellipsis; }
.queries { grid-area: 2 / 1; flex-direction: column; width: 8em; padding-right: .3rem; }
.queries span { justify-content: flex-end; }
.keys { grid-area: 1 / 2; height: 8em; padding-bottom: .3rem; }
.keys span { writing-mode: vertical-rl; transform: rotate(180deg); }
.keys b { max-height: 100%; }
@media (max-width: 59.99rem) { .names.wide { display: none; } }
@media (min-width: 60rem) {
  .look:not(.many) { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); align-items: start; }
  .look:not(.many) .heads { max-height: none; }
  .look:not(.many) .one { position: sticky; top: 1rem; }
}
output { display: block; min-height: 3rem; overflow-wrap: anywhere; }
"""
SCRIPT = """
"use strict";
const {tokens, layers, heads, weights} = JSON.parse(document.getElementById("data").textContent);
const T = tokens.length, size = T * (T + 1) / 2, bytes = atob(weights);
// A byte is 255 times the square root of a weight, so that small ones are seen, too.
const byteOf = (layer, head, query, key) =>
  key > query ? 0 : bytes.charCodeAt((layer * heads + head) * size + query * (query + 1) / 2 + key);
const weightOf = (...of) => (byteOf(...of) / 255) ** 2;
const percent = weight => weight >= 0.0995 ? Math.round(100 * weight) + "%" : (100 * weight).toFixed(1) + "%";
const find = name => document.querySelector(name), all = name => [...document.querySelectorAll(name)];
const large = find(".field canvas"), field = find(".field"), row = find(".row"), column = find(".column");
const headButtons = all(".heads button"), tokenButtons = all(".tokens button");
let layer = 0, head = 0, pinned = T - 1, query = T - 1, key = null;

const accent = () => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
  return [1, 3, 5].map(i => parseInt(probe.fillStyle.slice(i, i + 2), 16));
};
const picture = (layer, head) => {
  const image = new ImageData(T, T), [red, green, blue] = accent();
  for (let query = 0; query < T; query++) for (let key = 0; key <= query; key++)
    image.data.set([red, green, blue, byteOf(layer, head, query, key)], 4 * (query * T + key));
  return image;
};
const draw = () => {
  large.width = large.height = T;
  large.getContext("2d").putImageData(picture(layer, head), 0, 0);
};
const whole = document.createElement("canvas");
const drawAll = () => {
  whole.width = whole.height = T;
  for (const button of headButtons) {
    const small = button.firstChild;
    small.width = small.height = Math.min(T, 96);
    whole.getContext("2d").putImageData(picture(+button.dataset.layer, +button.dataset.head), 0, 0);
    small.getContext("2d").drawImage(whole, 0, 0, small.width, small.height);
  }
  draw();
};
const show = () => {
  find("#which").textContent = `Layer ${layer}, head ${head}`;
  for (const button of headButtons)
    button.ariaPressed = +button.dataset.layer === layer && +button.dataset.head === head;
  tokenButtons.forEach((button, i) => {
    const weight = weightOf(layer, head, query, i);
    button.style.setProperty("--weight", Math.sqrt(weight).toFixed(3));
    button.lastChild.textContent = i <= query && weight >= 0.0005 ? percent(weight) : "";
    button.ariaPressed = i === query;
    button.classList.toggle("later", i > query);
  });
  const share = 100 / T;
  row.style.top = query * share + "%"; row.style.height = share + "%";
  column.hidden = key === null;
  if (key !== null) { column.style.left = key * share + "%"; column.style.width = share + "%"; }
  const keys = tokens.map((_, i) => i).slice(0, query + 1);
  const best = keys.sort((a, b) => byteOf(layer, head, query, b) - byteOf(layer, head, query, a)).slice(0, 3);
  const name = i => `“${tokens[i]}” (${i})`, at = i => `${name(i)} ${percent(weightOf(layer, head, query, i))}`;
  find("output").textContent = key === null ? `${name(query)} looks at ${best.map(at).join(", ")}`
    : key > query ? `${name(query)} does not see ${name(key)}, which comes later`
    : `${name(query)} looks at ${at(key)}`;
};
for (const button of headButtons) button.addEventListener("click", () => {
  layer = +button.dataset.layer; head = +button.dataset.head; draw(); show();
});
tokenButtons.forEach((button, i) => {
  button.addEventListener("pointerenter", () => { query = i; key = null; show(); });
  button.addEventListener("pointerleave", () => { query = pinned; show(); });
  button.addEventListener("click", () => { query = pinned = i; key = null; show(); });
});
const point = event => {
  const box = large.getBoundingClientRect(), place = x => Math.min(Math.max(Math.floor(x * T), 0), T - 1);
  query = place((event.clientY - box.top) / box.height); key = place((event.clientX - box.left) / box.width);
  show();
};
field.addEventListener("pointermove", point);
field.addEventListener("click", event => { point(event); pinned = query; });
field.addEventListener("pointerleave", () => { query = pinned; key = null; show(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
show();
"""


def most_tokens(num_layers: int, num_heads: int) -> int:
    """How long a text may be, so that the page stays of a size that browsers open."""
    lower = MOST_BYTES / (num_layers * num_heads)
    return int((np.sqrt(8 * lower + 1) - 1) / 2)


def make_attention_page(model: str, tokens: Sequence[str], weights_LHTT: np.ndarray) -> str:
    """The whole page.

    Args:
        model: its name.
        tokens: the text that each position stands for.
        weights_LHTT: of each layer and head: query, then key; what comes later has none.
    """
    L, H, T, _ = weights_LHTT.shape
    queries, keys = np.tril_indices(T)
    packed = np.round(255 * np.sqrt(np.clip(weights_LHTT[:, :, queries, keys], 0, 1))).astype(np.uint8)
    names = [visible(token) for token in tokens]
    header = tag(
        "header",
        tag("h1", "Attention"),
        tag("p", f"{model} reads {T:,} tokens, first the one that stands before every text.", class_="quiet"),
    )
    grid = tag(
        "section",
        tag("h2", f"{L} layers of {H} heads" if L * H > 1 else "One head"),
        tag("p", "A row is a token, its columns what it looks at; the square root of the weight is drawn.",
            class_="quiet"),
        tag(
            "div",
            tag("span", ""),
            *(tag("span", head) for head in range(H)),
            *(cell for layer in range(L) for cell in (tag("span", layer), *(button(layer, head) for head in range(H)))),
            class_="heads" + " fine" * (T > NAMED),
            style=f"grid-template-columns:1.4rem repeat({H},minmax(2rem,1fr))",
        ),
    )  # fmt: skip
    chips = (
        tag("button", tag("b", name), tag("small", ""), type="button", data_token=i) for i, name in enumerate(names)
    )
    one = tag(
        "section",
        tag("h2", "", id="which"),
        tag("output", ""),
        tag("div", *chips, class_="tokens"),
        tag(
            "div",
            *(named(name, names) for name in ("keys", "queries") if T <= NAMED),
            tag("div", tag("canvas"), tag("i", class_="row"), tag("i", class_="column"), class_="field"),
            class_="map",
        ),
        class_="one",
    )
    data = {"tokens": names, "layers": L, "heads": H, "weights": base64.b64encode(packed.tobytes()).decode()}
    body = Html(header + tag("div", grid, one, class_="look" + " many" * (H > SIDE_BY_SIDE)))
    return document(f"{model}: attention", GENERATOR, body, data, SCRIPT, STYLE)


def button(layer: int, head: int) -> Html:
    """A head of the grid."""
    label = f"layer {layer}, head {head}"
    return tag("button", tag("canvas"), type="button", title=label, aria_label=label, data_layer=layer, data_head=head)


def named(axis: str, names: Sequence[str]) -> Html:
    """The tokens along an axis of the large head."""
    wide = " wide" * (len(names) > NAMED_ON_PHONE)
    return tag(
        "div", *(tag("span", tag("b", name)) for name in names), class_=f"names {axis}{wide}", aria_hidden="true"
    )


def visible(text: str) -> str:
    """A token whose line ends and tabs can be seen, and its spaces where it has nothing else."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    words = shown.rstrip(" ")
    spaces = len(shown) - len(words)
    return words + ("␣" if spaces == 1 else f"␣×{spaces}" if spaces else "")
