"""Bad inputs, drawn at random from tables, and what every command owes its user for each.

A command that is given a bad input ends with status 2 and a line, or does its work and ends with 0; it prints no
traceback, answers in time, stays within a bound of memory, and changes no file of the user's. Each case runs in a
child that is forked from a process which has imported the commands but has started no JAX backend: that takes a
hundredth of a new process's time. Cases about what Python and JAX read as they start get a process of their own.
"""

import contextlib
import gzip
import io
import json
import lzma
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.launch.small_run import ROOT, write_config

SECONDS, MEMORY = 90, 6 << 30
DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 5000

WORDS = [
    "", " ", "x", "-1", "0", "1e308", "1e12", "1e400", "nan", "-inf", "²", LONG, DEEP, "[", "{", "{}", "[]", "null",
    "true", '"a"', '{"a": 1, "a": 2}', "\udcff", "a\nb", "\x1b[31mred", "~nosuchuser/x", "~", ".", "/", "/dev/zero",
    "/proc/self/mem", "/proc/x/y", "no/such/parent/x", "[x]", "a\\b", "*", "**", "$(id)", "$HOME", "%j", "x@1", "x@",
    "s3://", "nowhere://a", "http://user:pass@127.0.0.1:9/x", "gs://", "file:///etc/passwd", "n" * 300, "1/0", "0x10",
    "1_000", "١", "1,2", ",", "=", "--", "-", '{"*": {"learning_rate": "x"}}', '{"[": {"beta2": null}}',
    '{"matrix": {"schedule": {}, "x": 1}}', '{"": {"warmup_steps": 1e400}}', '{"embedding": {"beta1": 2}}',
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 1e308, 1e-320, "", "x", "²", "\x00", "\ud800", "a\nb", [], {},
    [[]], [None], {"a": {}}, [1, 2], {"": 0}, "n" * 5000,
]  # fmt: skip
BYTES = [
    b"", b"\x00", b"\x00" * 5000, b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[]", b"5", b"null", b'"x"', b"{}",
    b"NaN", DEEP.encode(), LONG.encode(), b'{"a": 1}\n' * 3, b"\n\n\n", b"\x80abc\n", b'{"text": "\\ud800"}\n',
]  # fmt: skip


@dataclass
class Case:
    """One command with something bad about it.

    Attributes:
        kind: what is bad: flags, fields, config file, run, weights, tokenizer, corpus, environment.
        detail: what exactly, for the reader of a failure.
        command: the words of the command line.
        prepare: makes the bad input in the folder of the case, before its files are recorded.
        environment: variables of a process of its own; None: a forked child will do.
        kept: files and folders, relative to the case's folder, that the command must leave as they are.
    """

    kind: str
    detail: str
    command: list[str]
    prepare: Callable[[Path], None] = lambda folder: None
    environment: dict[str, str] | None = None
    kept: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """How a case ended: its exit status (None: it hung), its output, and what is wrong with that (empty: nothing)."""

    kind: str
    detail: str
    command: list[str]
    status: int | None
    output: str
    problem: str
    seconds: float


class Fuzzer:
    """Draws cases and runs them, each in a folder of its own.

    Args:
        folder: an empty folder; the good files from which bad ones are made are written to `folder/good`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.good = folder, folder / "good"
        self.good.mkdir(parents=True)
        # The commands must be imported before a child is forked; the run is trained in a child, so that this process
        # never starts a backend.
        import_commands()
        config = write_config(self.good)
        # Relative paths, so that a copy's config names the copy's corpus and run.
        config.write_text(config.read_text().replace(f"{self.good}/", ""))
        status, output, _ = fork(["pretrain", *GOOD_CONFIG, "--config.train.num_steps=6"], self.good)
        assert status == 0, output

    def run(self, case: Case, number: int) -> Outcome:
        """Runs one case in a folder of its own, which is removed afterwards."""
        folder = self.folder / f"case{number}"
        shutil.copytree(self.good, folder, symlinks=True)
        try:
            case.prepare(folder)
            before = contents(folder, case.kept)
            if case.environment is None:
                status, output, seconds = fork(case.command, folder)
            else:
                status, output, seconds = start(case.command, folder, case.environment)
            problem = problem_of(status, output)
            if not problem and contents(folder, case.kept) != before:
                problem = "changed a file of the user's"
            return Outcome(case.kind, case.detail, case.command, status, output, problem, seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def draw(self, chance: random.Random, kind: str | None = None) -> Case:
        """Draws a case, of a kind by the name of its function, or of any."""
        kinds = [draw for draw in KINDS if kind in (None, draw.__name__)]
        return chance.choice(kinds)(chance, self.good)


def import_commands() -> None:
    """Imports the modules of all commands, as far as they go without a JAX backend."""
    import importlib
    import pkgutil

    import launch
    import train

    for package in (launch, train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(module.name)


def fork(command: list[str], folder: Path) -> tuple[int | None, str, float]:
    """Runs a command in a forked child; returns its status, its output and how long it took."""
    output, begun = folder / ".output", time.monotonic()
    child = os.fork()
    if child == 0:
        run_in_child(command, folder, output)
    status = wait(child, begun)
    return status, read_output(output), time.monotonic() - begun


def run_in_child(command: list[str], folder: Path, output: Path) -> None:
    """Runs the command in this process, which then ends."""
    status = 70
    try:
        os.setsid()
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(folder)
        os.environ["JAX_PLATFORMS"] = "cpu"
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from launch.cli import main

        status = main(command)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def start(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int | None, str, float]:
    """Runs a command as a process of its own."""
    output, begun = folder / ".output", time.monotonic()
    with output.open("wb") as stream:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=stream, start_new_session=True, env=variables,
        )  # fmt: skip
    status = wait(process.pid, begun)
    process.returncode = status
    return status, read_output(output), time.monotonic() - begun


def wait(child: int, begun: float) -> int | None:
    """Waits for a child; ends it and returns None where it takes too long."""
    while time.monotonic() - begun < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def read_output(path: Path) -> str:
    return path.read_bytes()[-200_000:].decode(errors="replace") if path.exists() else ""


def problem_of(status: int | None, output: str) -> str:
    """Returns what is wrong with an ending; empty where nothing is."""
    if status is None:
        return f"no answer in {SECONDS} s"
    if "Traceback (most recent call last)" in output or "panicked at" in output:
        return "traceback"
    if status not in (0, 2):
        return f"status {status}"
    if status == 2 and not output.strip():
        return "status 2 without a word"
    if "\x1b" in output:
        return "escape sequence in the output"
    return ""


def contents(folder: Path, names: list[str]) -> dict[str, bytes | str]:
    """Returns the files below some files and folders of a case, by name; links and devices by what they are."""
    found: dict[str, bytes | str] = {}
    for name in names:
        top = folder / name
        for path in [top, *(top.rglob("*") if top.is_dir() and not top.is_symlink() else [])]:
            if path.is_symlink():
                found[str(path)] = f"link to {os.readlink(path)}"
            elif path.is_file():
                found[str(path)] = path.read_bytes()
            elif path.exists():
                found[str(path)] = "folder or device"
    return found


# ---- What is drawn ---------------------------------------------------------------------------------------------------

READERS = [
    ["report", "RUN"], ["evaluate", "RUN"], ["generate", "RUN", "--prompt=a", "--max_new_tokens=2"],
    ["inspect", "data", "RUN", "--step=2"], ["inspect", "loss", "RUN", "--prompt=the cat"],
    ["inspect", "embedding", "RUN", "--token=the"], ["export", "RUN", "--format=hf", "--to=new"],
    ["export", "RUN", "--format=gguf", "--to=new.gguf"], ["merge", "run@4", "RUN", "--to=new"], ["chat", "RUN"],
]  # fmt: skip
# Commands that open weights, and what they need besides.
OPENERS = [
    ["evaluate", "WEIGHTS", "--corpus=corpus.jsonl"], ["generate", "WEIGHTS", "--prompt=a", "--max_new_tokens=2"],
    ["inspect", "loss", "WEIGHTS", "--prompt=the cat"], ["import", "WEIGHTS", "--to=new"],
    ["export", "WEIGHTS", "--format=gguf", "--to=new.gguf"], ["export", "WEIGHTS", "--format=hf", "--to=n"],
]  # fmt: skip
RESUME = ["pretrain", "--config=run.py", "--config.train.num_steps=7", "--config.evaluation.every_steps=7"]
USERS_FILES = ["corpus.jsonl", "run.py"]
GOOD_CONFIG = ["--config=run.py"]


def named(command: list[str], **names: str) -> list[str]:
    """Returns the command with names put in for RUN or WEIGHTS."""
    return [names.get(word, word) for word in command]


def bad_flag(chance: random.Random, good: Path) -> Case:
    """One flag of a command with a bad value; its other flags are good."""
    from launch.commands import Parser

    command = chance.choice([*READERS, *OPENERS, ["tokenize", *GOOD_CONFIG, "--to=new"],
                             ["inspect", "data", *GOOD_CONFIG, "--summary"], ["plan", *GOOD_CONFIG],
                             ["launch", "slurm", "--output=new.sh", "--", "pretrain", *GOOD_CONFIG],
                             ["launch", "kubernetes", "--output=new.yaml", "--", "pretrain", *GOOD_CONFIG],
                             ["launch", "local", "--processes=1", "--restarts=0", "--", "presets"],
                             ["inspect", "attention", "RUN", "--prompt=the cat", "--to=new.html"],
                             ["inspect", "data", *GOOD_CONFIG, "--step=2"], ["report", "RUN", "--output=new.html"],
                             ["presets"], ["completion", "bash"], ["doctor"]])  # fmt: skip
    command = named(command, RUN="run", WEIGHTS="run/export")
    name = next(n for n in (" ".join(command[:2]), command[0]) if n in commands())
    flags = [o.option_strings[-1] for o in Parser(name).options if not o.option_strings[-1].startswith("--config.")]
    flag, word = chance.choice(flags), argv_word(chance)
    split = command.index("--") if "--" in command else len(command)
    words = [w for w in command[:split] if not w.startswith(f"{flag}=")]
    kept = [*USERS_FILES, "run/config.json", "run/checkpoints", "run/export", "run/tokenizer"]
    return Case("flag", f"{flag}={word[:60]!r}", [*words, f"{flag}={word}", *command[split:]], kept=kept)


def commands() -> dict[str, Any]:
    from launch.commands import COMMANDS

    return COMMANDS


def argv_word(chance: random.Random) -> str:
    """Draws a word that an operating system can hand to a process."""
    return chance.choice([word for word in WORDS if len(os.fsencode(word)) < 120_000])


def bad_field(chance: random.Random, good: Path) -> Case:
    """One field of the config with a bad value, given as a flag."""
    from train.config.config import config_fields

    names = [f"{group}.{name}" for group, name, _ in config_fields()]
    name = chance.choice([name for name in names if name != "train.num_steps"])
    word = argv_word(chance)
    # Whatever is read before training: a value that is good must not train for long.
    command = chance.choice([
        ["inspect", "data", *GOOD_CONFIG, "--summary"], ["tokenize", *GOOD_CONFIG, "--to=new"],
        ["pretrain", *GOOD_CONFIG, "--config.train.run_dir=new", "--config.train.num_steps=2"],
    ])  # fmt: skip
    kept = [*USERS_FILES, "run"]
    return Case("field", f"{name}={word[:60]!r}", [*command, f"--config.{name}={word}"], kept=kept)


CONFIG_FILES = [
    "import sys; sys.exit(0)", "raise SystemExit", "raise SystemExit('x')",
    "def get_config():\n    raise SystemExit(0)",
    "x = '\x00'", "# \udcff", "def get_config():\n    return 10**5000", "def get_config(): return None",
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'model': {1: 2}})",
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({1: {'a': 2}})",
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'train': {'num_steps': 10**5000}})",
    "from ml_collections import ConfigDict, config_dict\n"
    "def get_config(): return ConfigDict({'train': {'num_steps': config_dict.required_placeholder(int)}})",
    "class A:\n    def __repr__(self): raise ValueError('no')\nfrom ml_collections import ConfigDict\n"
    "def get_config(): return ConfigDict({'train': {'num_steps': A()}})",
    "def get_config(): return get_config()", "raise BrokenPipeError",
    "raise OSError(2, 'x')",
    "def get_config(a, b): pass", "get_config = 5", "",
]  # fmt: skip


def bad_config_file(chance: random.Random, good: Path) -> Case:
    """A config file that is not one."""
    text = chance.choice(CONFIG_FILES)
    command = chance.choice([["pretrain"], ["inspect", "data", "--summary"], ["tokenize", "--to=new"]])

    def prepare(folder: Path) -> None:
        (folder / "bad.py").write_bytes(text.encode(errors="surrogateescape"))

    kept = [*USERS_FILES, "run", "bad.py"]
    return Case("config file", repr(text[:80]), [*command, "--config=bad.py"], prepare, kept=kept)


GOOD_EXPERIMENT = """config = "run.py"
seeds = [0, 1]
baseline = "a"
equal = "tokens"
[shared]
model.num_layers = 1
[variants.a]
[variants.b]
optimizer.learning_rate = 0.1
"""
# Values and lines of TOML that may be anywhere in an experiment.
TOML = ["", "x", "0", "-1", "1e400", "nan", "true", '""', '"none"', '"a.b"', "[]", "[[]]", "{}", "{a = 1}",
        "1979-05-27", r'"\u0000"', "'''x", '"x', "[1, 2", "0x10", LONG, "[" * 5000,
        "{a." + "b." * 3000 + "c = 1}"]  # fmt: skip
TOML_LINES = ["[variants]", "[[variants]]", "[variants.a]", "[variants.'../c']", "[variants.'']", "variants.c = 3",
              "[x]", "= 3", "train.seed = 1", "train.run_dir = 'run'", "checkpoint.dir = '.'", r"'\x' = 1",
              "a.b.c.d = 1", "\0", "[variants.c]\nmodel = 3", "[variants.c]\nmodel.x.y = 3",
              "[shared]\n'a.b' = 1", "\udcff"]  # fmt: skip


def bad_experiment(chance: random.Random, good: Path) -> Case:
    """An experiment of `compare` of which a value or a line is another."""
    lines = GOOD_EXPERIMENT.splitlines()
    i = chance.randrange(len(lines))
    if chance.random() < 0.5 and "=" in lines[i]:
        lines[i] = f"{lines[i].partition('=')[0]}= {chance.choice(TOML)}"
    else:
        lines.insert(i, chance.choice(TOML_LINES))
    text = "\n".join(lines).encode(errors="surrogateescape")

    def prepare(folder: Path) -> None:
        (folder / "bad.toml").write_bytes(text)

    command = ["compare", "bad.toml", "--to=new", "--print-commands"]
    return Case("experiment", repr(lines[i][:60]), command, prepare, kept=[*USERS_FILES, "run", "bad.toml"])


def draw_damage(chance: random.Random, path: Path) -> tuple[str, Callable[[Path], None]]:
    """Draws a damage that suits this good file: what it is, and the function that does it to a copy."""
    ways = ["removed", "replaced", "cut in half", "zeros at its end", "link to itself", "link to nothing",
            "link to /dev/zero", "a folder", "a FIFO", "bits flipped"]  # fmt: skip
    if path.suffix in (".json", ".jsonl"):
        ways += ["a value of its JSON changed"] * 6
    way, data, seed = chance.choice(ways), chance.choice(BYTES), chance.random()
    detail = f"replaced by {data[:20]!r}" if way == "replaced" else way
    return detail, lambda copy: do_damage(copy, way, data, random.Random(seed))


def do_damage(path: Path, way: str, data: bytes, chance: random.Random) -> None:
    """Damages a file in one of the ways of `draw_damage`."""
    before = path.read_bytes()
    if way == "bits flipped":
        flipped = bytearray(before)
        for _ in range(8 if before else 0):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        return
    if way == "a value of its JSON changed":
        lines = before.decode().splitlines() if path.suffix == ".jsonl" else [before.decode()]
        i = chance.randrange(len(lines))
        lines[i] = json.dumps(changed(chance, json.loads(lines[i])))
        path.write_text("\n".join(lines) + "\n")
        return
    path.unlink()
    half = len(before) // 2
    match way:
        case "replaced":
            path.write_bytes(data)
        case "cut in half":
            path.write_bytes(before[:half])
        case "zeros at its end":
            path.write_bytes(before[:half] + bytes(len(before) - half))
        case "link to itself":
            path.symlink_to(path.name)
        case "link to nothing":
            path.symlink_to("/no/such/file")
        case "link to /dev/zero":
            path.symlink_to(endless_device(path))
        case "link to the user's corpus":
            path.symlink_to(next(folder / "corpus.jsonl" for folder in path.parents if (folder / "run.py").exists()))
        case "a folder":
            path.mkdir()
        case "a FIFO":
            os.mkfifo(path)


def endless_device(path: Path) -> str:
    """Returns the path of a device like /dev/zero; for root, who could replace that, one that stands beside `path`."""
    own = path.with_name(".zero")
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.mknod(own, stat.S_IFCHR | 0o666, os.makedev(1, 5))
            return str(own)
    return "/dev/zero"


def changed(chance: random.Random, value: Any) -> Any:
    """Returns a JSON value with one value in it replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        way = chance.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.15:
            return {**value, chance.choice(["x", "", "²"]): chance.choice(VALUES)}
        return {**value, key: changed(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.8:
        i = chance.randrange(len(value))
        return [*value[:i], changed(chance, value[i]), *value[i + 1 :]]
    if isinstance(value, int) and chance.random() < 0.5:
        return chance.choice([value + 1, -value, value * 10**6, float(value), str(value), [value]])
    return chance.choice(VALUES)


def bad_run(chance: random.Random, good: Path) -> Case:
    """A run of which one file is damaged."""
    run = good / "run"
    files = [path for path in run.rglob("*") if path.is_file() and "export" not in path.parts]
    # Half of the draws take a file that lies in the run's folder itself: a checkpoint has many small ones.
    own = [path for path in files if path.parent == run or path.parent.name == "tokenizer"]
    path = chance.choice(own if chance.random() < 0.7 else files)
    name, (way, damage) = path.relative_to(good), draw_damage(chance, path)
    command = named(chance.choice([*READERS, RESUME, RESUME]), RUN="run")
    kept = [*USERS_FILES, *(["run/checkpoints"] if command[0] != "pretrain" else [])]
    return Case("run", f"{name}: {way}", command, lambda folder: damage(folder / name), kept=kept)


# Files that a run reads or writes itself, and what may be there instead.
RUN_FILES = ["config.json", "lease.json", "events.jsonl", "metrics.jsonl", "positions.jsonl", "recovery.jsonl",
             "held_out.jsonl"]  # fmt: skip
NO_FILES = ["link to itself", "link to nothing", "link to /dev/zero", "link to the user's corpus", "a folder",
            "a FIFO"]  # fmt: skip


def bad_run_file(chance: random.Random, good: Path) -> Case:
    """A run in which something else is where one of its own files should be."""
    name, way = chance.choice(RUN_FILES), chance.choice(NO_FILES)
    command = named(chance.choice([*READERS[:4], RESUME, RESUME]), RUN="run")

    def prepare(folder: Path) -> None:
        path = folder / "run" / name
        path.touch()
        do_damage(path, way, b"", chance)

    kept = [*USERS_FILES, *(["run/checkpoints"] if command[0] != "pretrain" else [])]
    return Case("run file", f"{name}: {way}", command, prepare, kept=kept)


def bad_weights(chance: random.Random, good: Path) -> Case:
    """A folder of weights of which one file is damaged."""
    files = [path for path in (good / "run" / "export").rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix == ".json"]
    path = chance.choice(texts if chance.random() < 0.7 else files)
    name, (way, damage) = path.relative_to(good), draw_damage(chance, path)
    command = named(chance.choice(OPENERS), WEIGHTS="run/export")
    kept = [*USERS_FILES, "run"]
    return Case("weights", f"{name}: {way}", command, lambda folder: damage(folder / name), kept=kept)


def bad_corpus(chance: random.Random, good: Path) -> Case:
    """A corpus that is damaged, or of the wrong kind."""
    detail, write = chance.choice([bad_text, bad_text, compressed_wrongly, odd_parquet, odd_place])(chance, good)

    corpus = chance.choice(["bad", "bad", "bad/*", "bad/**", "."])
    command = chance.choice([
        ["inspect", "data", *GOOD_CONFIG, "--summary", f"--config.data.corpus={corpus}"],
        ["inspect", "data", *GOOD_CONFIG, "--step=2", f"--config.data.corpus={corpus}"],
        ["tokenize", *GOOD_CONFIG, "--to=new", f"--config.data.corpus={corpus}"],
        ["evaluate", "run", f"--corpus={corpus}"],
        ["pretrain", *GOOD_CONFIG, "--config.train.run_dir=new", "--config.train.num_steps=2",
         f"--config.data.corpus={corpus}"],
    ])  # fmt: skip
    extra = chance.choice([[], [], ["--config.data.on_bad_document=skip"], ["--config.data.text_separator=x"]])

    def prepare(folder: Path) -> None:
        (folder / "bad").mkdir()
        write(folder / "bad")

    command = command if command[0] == "evaluate" else [*command, *extra]
    return Case("corpus", f"{detail}, corpus={corpus}", command, prepare, kept=["corpus.jsonl", "run"])


Writer = Callable[[Path], None]


def bad_text(chance: random.Random, good: Path) -> tuple[str, Writer]:
    """One file: odd bytes under any name, or the good corpus damaged."""
    if chance.random() < 0.4:
        way, damage = draw_damage(chance, good / "corpus.jsonl")

        def damaged(folder: Path) -> None:
            shutil.copy(good / "corpus.jsonl", folder / "a.jsonl")
            damage(folder / "a.jsonl")

        return f".jsonl: {way}", damaged
    name = chance.choice(
        ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.tsv", "a.jsonl.zst", "a.jsonl.xz", "a.txt.xz"]
    )
    data = chance.choice([*BYTES, *ODD_TEXTS, (good / "corpus.jsonl").read_bytes()])
    return f"{name}: {data[:20]!r}", lambda folder: void((folder / name).write_bytes(data))


ODD_TEXTS = [
    b'{"text": ' + DEEP.encode() + b"}\n", b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, b"x" * 10**7,
    b'{"text": "' + b"x " * 10**6 + b'"}\n', b'{"text": "' + b"\\u0041" * 10**5 + b'"}\n', b'{"text": "a"}' * 1000,
    b'{"text": "a", "text": "b"}\n' * 50, b'{"text": ' + LONG.encode() + b"}\n", b'{"text": "a"}\r' * 50,
    b'\xef\xbb\xbf{"text": "a"}\n' * 50, b'{"text": "\\u0000\\u0000"}\n' * 50, b'[{"text": "a"}]\n', b"\n" * 10**6,
    b'{"text": "a"}\n\x00\x00\x00', "{\"text\": \"a\"}\n".encode("utf-16"), b"x\nx\nx\n" * 1000,
    b"\xc2\x85\xe2\x80\xa8" * 99,
]  # fmt: skip


def compressed_wrongly(chance: random.Random, good: Path) -> tuple[str, Writer]:
    """The good corpus compressed, and then cut, damaged, or put into another archive."""
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    suffix, inner = chance.choice(list(pack)), chance.choice(list(pack))
    data = pack[suffix]((good / "corpus.jsonl").read_bytes())
    way, at = chance.choice(["cut", "flipped", "twice", "archive", "zeros", "rest", "bomb", "many"]), chance.random()
    match way:
        case "cut":
            data = data[: int(at * len(data))]
        case "flipped":
            flipped = bytearray(data)
            flipped[int(at * len(data))] ^= 16
            data = bytes(flipped)
        case "twice":
            data = pack[inner](data)
        case "archive":
            data = pack[suffix](archive(good / "corpus.jsonl", chance.choice(["tar", "zip"])))
        case "zeros":
            data += bytes(1000)
        case "rest":
            data += b"rest" * 100
        case "bomb":
            data = pack[suffix](bytes(10**8))
        case "many":
            data = pack[suffix](b"") * 10_000 + data
    # As one document the zeros would be evaluated for long, and rightly.
    ending = chance.choice([".jsonl", ".json"] if way == "bomb" else [".jsonl", ".txt", ".json"])
    return f"{ending}{suffix}: {way} at {at:.2f}", lambda folder: void(
        (folder / f"a{ending}{suffix}").write_bytes(data)
    )


def archive(path: Path, kind: str) -> bytes:
    """Returns an archive of one file."""
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as zipped:
            zipped.write(path, path.name)
    else:
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.add(path, path.name)
    return out.getvalue()


def odd_parquet(chance: random.Random, good: Path) -> tuple[str, Writer]:
    """A Parquet file of an odd schema, or with flipped bits."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, dict[str, Any]] = {
        "numbers": {"text": [1, 2, 3]}, "lists": {"text": [["a"], []]}, "structs": {"text": [{"a": "b"}]},
        "nulls": {"text": [None] * 50}, "some nulls": {"text": ["a", None] * 50},
        "no rows": {"text": pyarrow.array([], "string")},
        "no text": {"body": ["a"] * 50}, "no columns": {}, "binary": {"text": [b"\xff\xfe"] * 50},
        "dictionary": {"text": pyarrow.array(["a", "b"] * 50).dictionary_encode()}, "empty texts": {"text": [""] * 50},
        "other case": {"Text": ["a"] * 50}, "odd names": {"te\nxt": ["a"], "": ["b"], "\x1b[31m": ["c"]},
        "large": {"text": pyarrow.array(["a b c"] * 50, "large_string")},
        "view": {"text": pyarrow.array(["a"] * 50, "string_view")},
        "nested name": {"text": [{"text": "a"}] * 50, "text.text": ["a"] * 50},
        "many": {f"c{i}": ["a"] for i in range(2000)},
        "invalid": {"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, [
            None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")])},
        "good": {"text": [f"{i} some text" for i in range(200)]},
    }  # fmt: skip
    kind, rows = chance.choice(list(columns)), chance.choice([1, 7, 1000])
    out = io.BytesIO()
    parquet.write_table(
        pyarrow.table(columns[kind]), out, row_group_size=rows, compression=chance.choice(["none", "zstd"])
    )
    data = bytearray(out.getvalue())
    flips = chance.choice([0, 0, 1, 8])
    # Not in the footer, where pyarrow itself aborts the process over some (docs/troubleshooting.md).
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(flips):
        data[chance.randrange(end)] ^= 1 << chance.randrange(8)
    cut = chance.choice([0, 0, 0, 9])
    data = data[: len(data) - cut]
    return f"parquet: {kind}, {flips} bits flipped, {cut} bytes cut", lambda folder: void(
        (folder / "a.parquet").write_bytes(data)
    )


def odd_place(chance: random.Random, good: Path) -> tuple[str, Writer]:
    """A folder with a link, a FIFO, a folder of a file's name, or odd names beside a good file."""
    way = chance.choice([
        "link to itself", "link to nothing", "link to /dev/zero", "a folder", "a FIFO", "link to a parent",
        "link to a file", "only a FIFO", "a socket", "odd names", "no permission", "deep folders",
    ])  # fmt: skip

    def write(folder: Path) -> None:
        text = (good / "corpus.jsonl").read_bytes()
        if way != "only a FIFO":
            (folder / "a.jsonl").write_bytes(text)
        match way:
            case "link to a parent":
                (folder / "up").symlink_to("..")
            case "link to a file":
                (folder / "b.jsonl").symlink_to("a.jsonl")
            case "only a FIFO":
                os.mkfifo(folder / "b.jsonl")
            case "a socket":
                os.mknod(folder / "b.jsonl", stat.S_IFSOCK | 0o600)
            case "odd names":
                for name in (
                    "b\n.jsonl",
                    "\x1b[31m.jsonl",
                    "\udcff.jsonl",
                    "-c.jsonl",
                    " .jsonl",
                    "%j.jsonl",
                    "[d].jsonl",
                ):
                    (folder / name).write_bytes(text)
            case "no permission":
                (folder / "b.jsonl").write_bytes(b"{")
                (folder / "b.jsonl").chmod(0)
            case "deep folders":
                deep = folder.joinpath(*["d"] * 500)
                deep.mkdir(parents=True)
                (deep / "b.jsonl").write_bytes(text)
            case _:
                (folder / "b.jsonl").write_bytes(text)
                do_damage(folder / "b.jsonl", way, b"", chance)

    return f"place: {way}", write


def void(_: Any) -> None:
    """Takes the value of an expression, so that it can be a `Writer`."""


def bad_environment(chance: random.Random, good: Path) -> Case:
    """A variable of the environment with a bad value, for a process of its own."""
    name, values = chance.choice([
        ("JAX_PLATFORMS", ["foo", "cuda", "", "cpu,foo"]), ("JAX_ENABLE_X64", ["1", "x"]), ("XLA_FLAGS", ["--x", "x"]),
        ("ZIGGURAT_NUM_PROCESSES", ["x", "-1", LONG, "2"]), ("ZIGGURAT_PROCESS_ID", ["x", "7"]),
        ("COLUMNS", ["0", "x"]),
        ("HOME", ["", "/no/such"]), ("TMPDIR", ["/no/such"]), ("LC_ALL", ["C", "de_DE.ISO-8859-1", "POSIX"]),
        ("PYTHONIOENCODING", ["ascii", "latin-1"]), ("TERM", ["dumb", ""]), ("OMP_NUM_THREADS", ["x", "0"]),
        ("SLURM_GPUS_ON_NODE", ["abc"]), ("SLURM_STEP_TASKS_PER_NODE", ["abc"]), ("SLURM_NODEID", ["7"]),
    ])  # fmt: skip
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
             "SLURM_STEP_NODELIST": "localhost"} if name.startswith("SLURM") else {}  # fmt: skip
    command = named(chance.choice([READERS[0], READERS[2], ["presets"], ["pretrain", "--help"],
                                   ["inspect", "data", *GOOD_CONFIG, "--summary"]]), RUN="run")  # fmt: skip
    value = chance.choice(values)
    detail = f"{name}={value[:40]!r}"
    return Case(
        "environment", detail, command, environment={**slurm, name: value}, kept=[*USERS_FILES, "run/config.json"]
    )


KINDS = [bad_flag, bad_flag, bad_field, bad_field, bad_config_file, bad_experiment, bad_run, bad_run,
         bad_run_file, bad_weights, bad_weights, bad_corpus, bad_corpus, bad_environment]  # fmt: skip
