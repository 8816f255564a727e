"""README.md and docs/: links, files, fields and commands that they name exist, and quoted messages are the code's."""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import outputs
from launch.commands import COMMANDS, parse
from tests.test_project import INNER_ORDER
from train.config.config import config_fields

ROOT = Path(__file__).resolve().parent.parent
PAGES = outputs.pages()
EVERY_PAGE = pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
FENCED = re.compile(r"^```.*?^```", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
FIELDS = {f"{group}.{name}" for group, name, _ in config_fields()}
ROOMS = ("model", "data", "train", "launch")
GROUPS = {field.partition(".")[0] for field in FIELDS}
OUR_FOLDERS = r"model|data|train|launch|tests|docs|\.ci|\.github"
OUR_FILE = re.compile(rf"(?<![\w/.@-])(?:(?:{OUR_FOLDERS})/[\w./-]*|settings\.py|[A-Z]+\.md)")


def prose(page: Path) -> str:
    """The text of a page without fenced blocks and marks."""
    return COMMENT.sub("", FENCED.sub("", page.read_text()))


def inline_code(page: Path) -> list[str]:
    """The spans of a page in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(command, output below it) for each `$ ` line of the page's fenced blocks."""
    for block in FENCED.findall(page.read_text()):
        for call in outputs.calls(block.splitlines()[1:-1]):
            if call.shown:
                yield call.command, call.output


def ziggurat_arguments(command: str) -> Iterator[list[str]]:
    """Arguments of each `ziggurat` that a shell command calls."""
    without_redirects = re.sub(r" 2>(&1| \S+)", "", command.replace("\\\n", " "))
    lexer = shlex.shlex(without_redirects, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not re.fullmatch(r"[|&;<>()]+", word):
            words.append(word)
            continue
        while words and (words[0] == "nice" or re.fullmatch(r"\w+=.*", words[0])):
            words = words[1:]
        if words and words[0] == "ziggurat":
            yield words[1:]
        words = []


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@EVERY_PAGE
def test_every_relative_link_resolves(page: Path):
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose(page)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.M)), f"{page.name}: {target}"


@EVERY_PAGE
def test_every_file_that_a_page_names_exists(page: Path):
    for code in inline_code(page):
        for name in OUR_FILE.findall(code):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
    for module in re.findall(r"python -m ((?:tests|launch)[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(module), f"{page.name}: {module}"


@EVERY_PAGE
def test_every_name_that_a_page_finds_in_a_file_is_there(page: Path):
    for name, file in re.findall(r"`([A-Za-z_]\w*)`\s+in\s+`([\w/]+\.py)`", prose(page)):
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        defined |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert name in defined, f"{page.name}: {name} in {file}"
    tests = {line for file in (ROOT / "tests").rglob("test_*.py") for line in file.read_text().splitlines()}
    for name in inline_code(page):
        if re.fullmatch(r"test_\w+", name):
            assert any(line.startswith(f"def {name}(") for line in tests), f"{page.name}: {name}"


@EVERY_PAGE
def test_every_field_that_a_page_names_exists(page: Path):
    shown = [command for command, output in commands(page) if not any("no such field" in line for line in output)]
    for text in [*inline_code(page), *shown]:
        for field in re.findall(r"--config\.(\w+\.[a-z]\w*)", text):
            assert field in FIELDS, f"{page.name}: --config.{field}"
        named = re.match(r"(\w+)\.(\w+)(?![\w.(])", text)
        if named and named[1] in GROUPS and named[2] not in ("py", "md", "json", "jsonl", "model"):
            assert named[0] in FIELDS, f"{page.name}: {text}"


@EVERY_PAGE
def test_every_command_that_a_page_names_exists(page: Path):
    groups = {name.partition(" ")[0] for name in COMMANDS}
    for code in inline_code(page):
        if not (named := re.match(r"ziggurat ((?:[a-z]+ ?){1,2})(?![\w/.=])", code)):
            continue
        words = named[1].split()
        assert words[0] in groups, f"{page.name}: {code}"
        if words[0] not in COMMANDS and len(words) > 1:
            assert " ".join(words) in COMMANDS, f"{page.name}: {code}"


@EVERY_PAGE
def test_every_command_that_a_page_runs_has_flags_that_exist(page: Path):
    for command, _ in commands(page):
        for arguments in ziggurat_arguments(command):
            if "..." not in arguments and "…" not in arguments:
                parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marked_blocks_can_be_run_again(page: Path):
    text = page.read_text()
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if line.startswith("<!-- "):
            mark = outputs.MARK.fullmatch(line)
            assert mark, f"{page.name}:{number + 1}: {line}"
            assert mark["hidden"] or lines[number + 1] == "```", f"{page.name}:{number + 1}"
    for block in outputs.blocks(lines):
        for call in block.calls:
            assert call.shown, f"{page.name}:{block.start}: a marked block begins with a command"
            is_run = block.mark["slow"] != "recorded"
            assert not is_run or call.output.count(outputs.CUT) <= 1, f"{page.name}: {call.command}: several cuts"


def test_renewing_a_page_keeps_cuts_and_skips_slow_blocks(tmp_path: Path):
    page = "\n".join(
        (
            "text",
            "<!-- before echo hidden > file -->",
            "<!-- output -->",
            "```",
            "$ cat \\",
            "  file",
            "old",
            "$ seq 9",
            "0",
            "...",
            "0",
            "```",
            "<!-- before echo no > file -->",
            "<!-- cached 2020-01-01 0.0.0 -->",
            "```",
            "$ echo slow",
            "old",
            "```",
            "<!-- recorded 2020-01-01 0.0.0 -->",
            "```",
            "$ echo by hand",
            "old",
            "```",
            "end",
        )
    )
    quick = page.replace("  file\nold", "  file\nhidden").replace("0\n...\n0", "1\n...\n9")
    assert outputs.renewed(page, tmp_path, slow=False) == quick
    slow = outputs.renewed(page, tmp_path, slow=True)
    assert "$ echo slow\nslow\n" in slow
    assert f"{outputs.version()} -->\n```\n$ echo slow" in slow
    assert "<!-- recorded 2020-01-01 0.0.0 -->\n```\n$ echo by hand\nold\n" in slow


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_with_an_output_of_ours_is_marked(page: Path):
    text = page.read_text()
    marked = {block.start for block in outputs.blocks(text.split("\n"))}
    for number, line in enumerate(lines := text.split("\n")):
        if line.startswith("$ ziggurat") and number not in marked and lines[number - 1] == "```":
            [call] = [*outputs.calls(lines[number : lines.index("```", number)])]
            assert not call.output, f"{page.name}:{number + 1}: mark the block, so that its output is renewed"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_drawing_of_the_house_has_every_room():
    drawing = (ROOT / "docs" / "architecture.md").read_text()
    for package, rooms in INNER_ORDER.items():
        for room in rooms:
            path = f"{package}/{room}"
            assert f"`{path}" in drawing, f"docs/architecture.md: {path} is not there"


def test_every_message_in_troubleshooting_is_one_of_the_codes():
    texts = [
        node.value
        for file in (ROOT / "settings.py", *(file for room in ROOMS for file in (ROOT / room).rglob("*.py")))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    source = "\n".join(texts)
    messages = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert messages
    for message in messages:
        for piece in re.split(r"\s*…\s*", message):
            assert piece in source, f"docs/troubleshooting.md: {message!r}: {piece!r} is in no message of the code"
