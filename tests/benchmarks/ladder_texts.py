"""The texts of tests/benchmarks/ladder.py: documentation in installed Python packages, and manuals of Debian.

    python -m tests.benchmarks.ladder_texts documentation|manuals FILE.jsonl [--root=/usr/share]

`documentation` is the docstrings of PACKAGES and the documentation of botocore's services, which `pip install -c
constraints.txt -e '.[peers]'` has installed: 52 MB. `manuals` is Linux's documentation, a dictionary, WordNet's glosses
and the manuals of PostgreSQL and Java, of MANUALS in the shares of Debian 12, unpacked below --root: 93 MB. One text is
one line, and none comes twice.
"""

import argparse
import ast
import gzip
import html
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from data.files.atomic import atomic_file

PACKAGES = ("torch", "sympy", "jax", "scipy", "numpy", "sklearn", "pandas", "networkx")
# Debian's packages, and their files.
MANUALS = {
    "linux-doc-6.1": "doc/linux-doc-6.1/Documentation/**/*.*",
    "dict-gcide": "dictd/gcide.dict.dz",
    "wordnet-base": "wordnet/data.*",
    "postgresql-doc-15": "doc/postgresql-doc-15/html/*.html",
    "openjdk-17-doc": "doc/openjdk-17-*/api/java*/**/*.html",
}
LEAST_CHARACTERS = 100
SHARE = Path("/usr/share")


def documentation(_: Path) -> Iterator[str]:
    """Docstrings, and the documentation of Amazon's services."""
    specs = {name: importlib.util.find_spec(name) for name in (*PACKAGES, "botocore")}
    if missing := [name for name, spec in specs.items() if spec is None]:
        sys.exit(f"not installed: {', '.join(missing)}; run pip install -c constraints.txt -e '.[peers]'")
    roots = {name: Path(spec.submodule_search_locations[0]) for name, spec in specs.items()}
    for name in PACKAGES:
        for file in sorted(roots[name].rglob("*.py")):
            yield from docstrings(file)
    for file in sorted((roots["botocore"] / "data").rglob("service-2.json.gz")):
        yield from documentation_of(json.loads(gzip.decompress(file.read_bytes())))


def docstrings(file: Path) -> Iterator[str]:
    """The docstrings of a file; none of one that this Python cannot parse."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def documentation_of(value: object) -> Iterator[str]:
    """The texts of "documentation" in some JSON, without tags and line breaks."""
    if isinstance(value, dict):
        for name, of_name in value.items():
            if name == "documentation" and isinstance(of_name, str):
                yield " ".join(re.sub("<[^>]+>", " ", of_name).split())
            else:
                yield from documentation_of(of_name)
    elif isinstance(value, list):
        for item in value:
            yield from documentation_of(item)


def manuals(root: Path) -> Iterator[str]:
    """The texts of MANUALS. Linux's documentation is without its translations."""
    linux, dictionary, glosses, postgresql, java = found = [
        sorted(root.glob(pattern), key=str) for pattern in MANUALS.values()
    ]
    if missing := [name for name, files in zip(MANUALS, found, strict=True) if not files]:
        sys.exit(f"not found below {root}: {', '.join(missing)}; unpack these packages of Debian, and give --root")
    for file in linux:
        name = str(file.relative_to(root))
        if not re.search("translations|/html|/output", name) and re.search(r"\.(rst|txt|yaml)(\.gz)?$", name):
            yield (gzip.decompress if name.endswith(".gz") else bytes)(file.read_bytes()).decode(errors="replace")
    entries = re.split(r"\n(?=\S)", gzip.decompress(dictionary[0].read_bytes()).decode(errors="replace"))
    yield from (re.sub(r"[ \t]*\n[ \t]+", " ", entry) for entry in entries)
    for file in glosses:
        yield from (line.split("|", 1)[1] for line in file.read_text("latin-1").split("\n") if "|" in line)
    for file in postgresql:
        yield Page().text(file)
    for file in java:
        if not re.search("class-use|package-", str(file.relative_to(root))):
            blocks = re.findall(r'<div class="block">(.*?)</div>', file.read_text(errors="replace"), re.DOTALL)
            yield from (" ".join(html.unescape(re.sub("<[^>]+>", "", block)).split()) for block in blocks)


class Page(HTMLParser):
    """The text of a page, a block on each line."""

    BLOCKS = ("p", "div", "li", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "tr", "br", "section")
    LEFT_OUT = ("script", "style", "nav", "header")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a line, or a part that is left out."""
        self.depth += tag in self.LEFT_OUT
        self.parts += ["\n"] if tag in self.BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        """End a part that is left out."""
        self.depth = max(0, self.depth - (tag in self.LEFT_OUT))

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.parts += [] if self.depth else [data]

    def text(self, file: Path) -> str:
        """Read a page."""
        self.feed(file.read_text(errors="replace"))
        return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", "".join(self.parts)))


TEXTS: dict[str, Callable[[Path], Iterable[str]]] = {
    "documentation": documentation,
    "manuals": lambda root: map(str.strip, manuals(root)),
}


def write_text(name: str, path: Path, root: Path = SHARE) -> Path:
    """Write one of TEXTS, without the short ones and those that were there before; or find it written."""
    if path.exists():
        return path
    texts = dict.fromkeys(text for text in TEXTS[name](root) if len(text) >= LEAST_CHARACTERS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TEXTS)
    parser.add_argument("path", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--root", type=Path, default=SHARE, help="where Debian's packages are unpacked")
    arguments = parser.parse_args()
    print(write_text(arguments.name, arguments.path, arguments.root))


if __name__ == "__main__":
    main()
