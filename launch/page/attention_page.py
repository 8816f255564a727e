"""The page of a model's attention over a text: a grid of heads, one of them large, and the weights of each token."""

import base64
from collections.abc import Sequence

import numpy as np

from launch.page.markup import Html, element, html_page

# By this comment a later command recognizes a page that it may replace.
GENERATOR = "<!-- ziggurat attention -->"
# Bytes of all weights, one a weight; base64 in the page takes a third more.
MAX_WEIGHT_BYTES = 12 * 2**20
# Most tokens that are named along the large head, on a wide page and on a phone.
MAX_NAMED, MAX_NAMED_ON_PHONE = 40, 24
# Most heads of a layer that leave room for the large head next to the grid.
MAX_SIDE_BY_SIDE = 12


def max_tokens(num_layers: int, num_heads: int) -> int:
    """Returns the longest text whose page browsers can open."""
    # The lower triangle of T × T weights has T (T + 1) / 2.
    weights_of_a_head = MAX_WEIGHT_BYTES / (num_layers * num_heads)
    return int((np.sqrt(8 * weights_of_a_head + 1) - 1) / 2)


def make_attention_page(model: str, tokens: Sequence[str], weights_LHTT: np.ndarray) -> str:
    """Returns the whole page of a model, by the text of each token; weights are by query, then key (zero if later)."""
    L, H, T, _ = weights_LHTT.shape
    queries, keys = np.tril_indices(T)
    packed = np.round(255 * np.sqrt(np.clip(weights_LHTT[:, :, queries, keys], 0, 1))).astype(np.uint8)
    names = [token_label(token) for token in tokens]
    introduction = f"{model} reads {T:,} tokens, first the one before every text."
    header = element("header", element("h1", "Attention"), element("p", introduction, class_="quiet"))
    parts = element("div", head_grid(L, H, T), large_head(names), class_="look" + " many" * (H > MAX_SIDE_BY_SIDE))
    data = {"tokens": names, "layers": L, "heads": H, "weights": base64.b64encode(packed.tobytes()).decode()}
    return html_page(f"{model}: attention", GENERATOR, Html(header + parts), data, "attention")


def head_grid(L: int, H: int, T: int) -> Html:
    """Returns a grid of all heads, a row for each layer."""
    cells = [element("span", ""), *(element("span", head) for head in range(H))]
    for layer in range(L):
        cells.append(element("span", layer))
        for head in range(H):
            text = f"layer {layer}, head {head}"
            attributes = {"title": text, "aria_label": text, "data_layer": layer, "data_head": head}
            cells.append(element("button", element("canvas"), type="button", **attributes))
    title = element("h2", f"{L} layers of {H} heads" if L * H > 1 else "One head")
    note = "A row is a token, its columns the tokens that it looks at; the square root of the weight is drawn."
    style = f"grid-template-columns:1.4rem repeat({H},minmax(2rem,1fr))"
    grid = element("div", *cells, class_="heads" + " fine" * (T > MAX_NAMED), style=style)
    return element("section", title, element("p", note, class_="quiet"), grid)


def large_head(names: Sequence[str]) -> Html:
    """Returns the text, whose tokens can be chosen, and one head at a large size."""
    buttons = (
        element("button", element("b", name), element("small", ""), type="button", data_token=i)
        for i, name in enumerate(names)
    )
    field = element("div", element("canvas"), element("i", class_="row"), element("i", class_="column"), class_="field")
    wide = " wide" * (len(names) > MAX_NAMED_ON_PHONE)
    axes = []
    for axis in ("keys", "queries") if len(names) <= MAX_NAMED else ():
        spans = (element("span", element("b", name)) for name in names)
        axes.append(element("div", *spans, class_=f"names {axis}{wide}", aria_hidden="true"))
    title = element("h2", "", id="which")
    tokens = element("div", *buttons, class_="tokens")
    return element(
        "section", title, element("output", ""), tokens, element("div", *axes, field, class_="map"), class_="one"
    )


def token_label(text: str) -> str:
    """Returns a token with its line ends, tabs and trailing spaces made visible."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    words = shown.rstrip(" ")
    spaces = len(shown) - len(words)
    return words + (f"␣×{spaces}" if spaces > 1 else "␣" * spaces)
