"""HTML elements and pages from Python. Every text is escaped unless it already is markup."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from importlib import resources
from typing import Any


class Html(str):
    """A text that is markup and is not escaped again."""


def element(name: str, *inside: Any, **attributes: Any) -> Html:
    """Returns an element. A final _ of an attribute's name (`class_`) is dropped; any other _ becomes -."""
    written = name
    for key, value in attributes.items():
        written += f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    return Html(f"<{written}>{fragment(inside)}</{name}>")


def fragment(parts: Iterable[Any]) -> Html:
    """Returns texts and elements one after the other; None is left out."""
    present = (part for part in parts if part is not None)
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in present))


def html_page(title: str, generator: str, body: Html, data: Any, name: str, has_cursors: bool = False) -> str:
    """Returns a whole page, which loads nothing and runs no script but its own: `NAME.js`, with charts.js before it.

    The comment `generator` names the command that may replace the page. The script reads `data`, a JSON value; without
    data there is no script. The style sheet is style.css and, where there is one, `NAME.css`.

    Args:
        has_cursors: charts have cursors, as charts.js moves them; without them that script is left out.
    """
    files = resources.files("launch.page")
    scripts = (["charts"] if has_cursors else []) + [name]
    script = "".join(files.joinpath(f"{file}.js").read_text() for file in scripts) if data else ""
    own_style = files.joinpath(f"{name}.css")
    style = files.joinpath("style.css").read_text() + (own_style.read_text() if own_style.is_file() else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    # Only a < could end the script element that holds the data.
    json_text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        # An empty icon keeps browsers from requesting one.
        Html('<link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Html(style)),
    )
    json_element = element("script", Html(json_text), type="application/json", id="data")
    page = element(
        "html", head, element("body", body, json_element, element("script", Html(script)) if data else None), lang="en"
    )
    # JSON strings may hold lone surrogates, which UTF-8 cannot.
    return f"<!doctype html>\n{generator}\n{page}\n".encode(errors="replace").decode()
