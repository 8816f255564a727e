"""`ziggurat chat`: from a pipe and on a terminal, its commands, and what is refused."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import data.chat
from data.config import DataConfig
from data.conversations import open_template
from data.errors import InputError
from data.mixture import open_mixture
from data.tokenizer.folder import load_tokenizer
from launch.chat import LONGEST_LINE, Session, seed_of
from launch.streams import insistent_interrupts
from tests.launch.small_chats import EXAMPLE
from tests.launch.small_run import command, environment, here
from train.evaluation.continuation import ContinuationPart

Asked = list[tuple[list[int], int]]
FLAGS = ("--seed=3", "--max_new_tokens=9", "--system=be short")


def piped(monkeypatch, capsys, lines: str, *arguments: object) -> str:
    """The standard output of a chat in this process."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    capsys.readouterr()
    assert here("chat", *arguments) == 0
    return capsys.readouterr().out


class Model:
    """A model that answers with a number that grows, in two parts, and keeps what it was asked."""

    def __init__(self, interrupts: bool = False):
        self.asked: Asked = []
        self.interrupts = interrupts

    def __call__(self, ids: list[int], seed: int) -> Iterator[ContinuationPart]:
        self.asked.append((ids, seed))
        yield ContinuationPart(0, "answer ", 1, None)
        if self.interrupts:
            signal.raise_signal(signal.SIGINT)
            while True:
                time.sleep(0.01)
        yield ContinuationPart(0, str(len(self.asked)), 2, "eos")


@pytest.fixture
def prompts(chatted: Path) -> data.chat.Prompts:
    return data.chat.Prompts(load_tokenizer(chatted / "tokenizer"))


def talk(monkeypatch, prompts: data.chat.Prompts, lines: str, model: Model, **kwargs: object) -> data.chat.Chat:
    """A chat of these lines with a stand-in for a model."""
    context = int(kwargs.pop("context", 1000))
    chat = data.chat.Chat(prompts, context, 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    Session(chat, model, **{"seed": 5, "is_greedy": False, "is_terminal": False} | kwargs).run()
    return chat


def typed(monkeypatch, *lines: str | type[BaseException]) -> None:
    """Lines, and keys that end them, as someone types them at a terminal."""
    waiting = [*lines, EOFError]

    def read(prompt: str) -> str:
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_answers_from_a_pipe_are_the_same_in_a_process_of_its_own_and_from_the_export(chatted, monkeypatch, capsys):
    lines = "who is cat 7?\n\nwho is \\\ndog 8?\n/regenerate\nwho is bird 9?"
    here_out = piped(monkeypatch, capsys, lines, chatted, *FLAGS)
    assert piped(monkeypatch, capsys, lines, chatted / "export", *FLAGS) == here_out
    process = command("chat", chatted, *FLAGS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(lines + "\n/quit\nwho?")
    assert (process.returncode, out) == (0, here_out)
    assert "\x1b" not in out + err
    assert "> " not in out
    assert len(out.split()) > 4


def test_the_model_sees_the_whole_conversation(prompts, monkeypatch):
    model = Model()
    chat = talk(monkeypatch, prompts, "one\ntwo  \\\n 2\n three\n", model)
    messages = chat.messages()
    assert [message["content"] for message in messages[::2]] == ["one", "two  \n 2", "three"]
    assert [ids for ids, _ in model.asked] == [prompts.ids(messages[: 2 * n + 1]) for n in range(3)]


def test_an_answer_ends_where_the_template_ends_one_and_before_a_mark_as_text(chatted, tmp_path, monkeypatch, capsys):
    flags = (chatted, "--greedy", "--max_new_tokens=12")
    free = piped(monkeypatch, capsys, "who is cat 7?", *flags).removesuffix("\n")
    tokenizer = load_tokenizer(chatted / "tokenizer")
    assert len(free) > 3
    # A token in the middle of the answer, as if a template ended answers with it.
    ids = tokenizer.encode(free).tolist()
    end = next(token for token in ids[1:] if token != ids[0] and tokenizer.token_bytes(token).strip())
    with monkeypatch.context() as patch:
        patch.setattr(data.chat, "tokens_that_end", lambda *_: [end])
        ended = piped(patch, capsys, "who is cat 7?", *flags)
        file = tmp_path / "prompts.jsonl"
        file.write_text(json.dumps({"messages": [{"role": "user", "content": "who is cat 7?"}]}) + "\n")
        assert here("generate", chatted, f"--prompts={file}", "--greedy", "--max_new_tokens=12") == 0
        [line] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    piece = tokenizer.token_bytes(end).decode(errors="replace")
    assert free.startswith(ended.removesuffix("\n"))
    assert ended.removesuffix("\n") in (free[:i] for i in range(len(free)) if free[i:].startswith(piece))
    assert (line["text"] + "\n", line["ended"]) == (ended, "eos")
    question = "who is cat 7?"
    mark = next(free[i : i + 2] for i in range(2, len(free)) if free[i : i + 2] not in question)
    monkeypatch.setattr(data.chat.Prompts, "marks", property(lambda _: [mark], lambda *_: None), raising=False)
    assert piped(monkeypatch, capsys, question, *flags) == free[: free.index(mark)] + "\n"


def test_an_answer_never_goes_beyond_the_context(chatted: Path, monkeypatch, capsys):
    flags = ("--greedy", "--max_new_tokens=1000", "--repetition_penalty=1.5")
    out = piped(monkeypatch, capsys, "who is cat 7?\n" * 4, chatted, *flags)
    tokenizer = load_tokenizer(chatted / "tokenizer")
    assert len(tokenizer.encode(out)) < 4 * 64
    monkeypatch.setattr(sys, "stdin", io.StringIO("who is cat 7? " * 20))
    assert here("chat", chatted) == 2
    assert "the question is too long: it has" in capsys.readouterr().err


def test_each_attempt_draws_by_seed_turn_and_attempt(prompts, monkeypatch):
    model = Model()
    chat = talk(monkeypatch, prompts, "one\n/regenerate\n/regenerate\ntwo\n/regenerate\n/clear\none\n", model)
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0)]
    assert [seed for _, seed in model.asked] == [seed_of(5, turn, attempt) for turn, attempt in places]
    assert len({seed_of(s, turn, attempt) for s in range(2) for turn, attempt in places}) == 10
    assert all(0 <= seed_of(2**31 - 1, turn, 9) < 2**31 for turn in range(50))
    ids = [ids for ids, _ in model.asked]
    assert ids[0] == ids[1] == ids[2] == ids[5]
    assert ids[3] == ids[4]
    # The newest attempt counts.
    assert [turn.answer for turn in chat.turns] == ["answer 6"]
    with pytest.raises(InputError, match="no effect with --greedy"):
        talk(monkeypatch, prompts, "one\n/regenerate\n", Model(), is_greedy=True)


def test_a_saved_conversation_can_be_trained_on(chatted, prompts, tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "a b.jsonl"
    file.write_text('{"messages": "not ended"}')
    talk(monkeypatch, prompts, f"é one\n/save {file}\ntwo\\\n2\n/regenerate\n/save  {file} \n", Model())
    assert capsys.readouterr().err.splitlines() == [
        f"{file}: appended a conversation with {n}" for n in ("1 answer", "2 answers")
    ]
    first, *lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert first == {"messages": "not ended"}
    turns = [("user", "é one"), ("assistant", "answer 1"), ("user", "two\n2"), ("assistant", "answer 3")]
    assert lines == [{"messages": [{"role": r, "content": c} for r, c in turns[:n]]} for n in (2, 4)]
    file.write_text("\n".join(file.read_text().splitlines()[1:]))
    config = DataConfig(corpus=str(file), messages_field="messages", validation_fraction=0.0, num_streams=1)
    template = open_template(config, load_tokenizer(chatted / "tokenizer"))
    corpus = open_mixture(config, lambda: "", template=template).sources[0].corpus
    documents = [document for chunk in corpus.chunks for document in corpus.documents(chunk)]
    assert [len(document.answers) for document in documents] == [1, 2]


def test_what_a_chat_refuses_is_one_line_at_which_a_pipe_ends(prompts, tmp_path: Path, monkeypatch):
    (tmp_path / "pipe.jsonl").mkdir()
    for line, words in (
        ("/regenerate", "no question yet"),
        ("/save", "/save: give one of /regenerate, /save FILE"),
        ("/save x.jsonl", "no answer yet"),
        ("/clear all", "/clear: give one of"),
        ("/etc/passwd?", "/etc/passwd\\?: give one of .*; a space before it makes the line a question"),
        ("one\n/save notes.py", "name a file that ends with .jsonl"),
        (f"one\n/save {tmp_path}/pipe.jsonl", "name a file that ends with .jsonl"),
        (f"one\n/save {tmp_path}/none/a.jsonl", "a.jsonl: No such file or directory; name another"),
        ("one\n/save a\tb.jsonl", "the file's name has a line end or another control character"),
        ("a <|endoftext|> b", "the question holds '<|endoftext|>', which the tokenizer reads as a mark"),
        ("a \udcff b", "the question is not valid UTF-8"),
        ("a" * (LONGEST_LINE + 1), "a line of more than 1,048,576 characters"),
    ):
        model = Model()
        with pytest.raises(InputError, match=words.replace("|", "\\|")) as caught:
            talk(monkeypatch, prompts, f"{line}\ntwo", model)
        assert "\n" not in str(caught.value)
        assert len(model.asked) == line.startswith("one")
    # The same in a locale whose input is strict.
    monkeypatch.setattr(io, "StringIO", lambda lines: io.TextIOWrapper(io.BytesIO(lines.encode("latin-1")), "utf-8"))
    with pytest.raises(InputError, match="the question is not valid UTF-8"):
        talk(monkeypatch, prompts, "a \xff b\ntwo", Model())
    model = Model()
    assert talk(monkeypatch, prompts, " /etc/passwd?", model).turns[0].question == "/etc/passwd?"


def test_on_a_terminal_a_chat_goes_on_after_what_it_refuses(prompts, monkeypatch, capsys):
    typed(monkeypatch, "/nosuch", "a <|endoftext|>", "one", "/help", " ", "two " * 40, "three", "four")
    model = Model()
    chat = talk(monkeypatch, prompts, "", model, is_terminal=True, context=60)
    assert [turn.question for turn in chat.turns] == ["one", "three", "four"]
    out, err = capsys.readouterr()
    assert out == "answer 1\nanswer 2\nanswer 3\n\n"
    for words in ("/nosuch: give one of", "holds '<|endoftext|>'", "/save FILE   append the", "is too long: it has"):
        assert words in err


def test_turns_that_the_context_has_no_room_for_are_named_in_one_line(prompts, monkeypatch, capsys):
    model = Model()
    chat = talk(monkeypatch, prompts, "who is cat 7?\n" * 9, model, context=64)
    assert len(chat.messages()) == 18
    assert max(len(ids) for ids, _ in model.asked) < 64
    notes = capsys.readouterr().err.splitlines()
    assert 0 < len(notes) < 9
    assert all(line.startswith("the context is full: the model no longer sees the ") for line in notes)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_ends_the_answer_and_keeps_the_chat_of_a_terminal(is_terminal: bool, prompts, monkeypatch, capsys):
    typed(monkeypatch, "one", "/regenerate", "tw\\", KeyboardInterrupt, "three")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr("launch.streams.SECONDS_BETWEEN_INTERRUPTS", 0.05)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = Model(interrupts=True)
    try:
        with insistent_interrupts():
            if not is_terminal:
                with pytest.raises(KeyboardInterrupt):
                    talk(monkeypatch, prompts, "one\ntwo", model)
                assert len(model.asked) == 1
                return
            chat = talk(monkeypatch, prompts, "", model, is_terminal=True)
            # No interrupt comes once more.
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGALRM, before[1])
    assert [(turn.question, turn.answer) for turn in chat.turns] == [("one", "answer "), ("three", "answer ")]
    assert capsys.readouterr().out == "answer \n" * 2 + "\n" + "answer \n" + "\n"


def test_what_is_wrong_is_said_before_weights_are_read(finished, chatted, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("who?"))
    run = shutil.copytree(chatted / "export", tmp_path / "weights")
    (run / "model.safetensors").write_bytes(b"")
    for arguments, words in (
        ([finished], ["has no chat template; take a model that was trained on conversations"]),
        ([chatted, "--system=a<|endoftext|>"], ["--system holds '<|endoftext|>'"]),
        (
            [chatted, "--top_p=0", "--greedy", "--seed=1", f"--template={tmp_path}/none", "--max_new_tokens=0"],
            ["--top_p=0.0 must", "--seed has no effect", "there is no such file; name a Jinja", "--max_new_tokens=0"],
        ),
        ([chatted, f"--template={tmp_path}/weights/config.json"], ["does not write the question"]),
        ([chatted, "--system=" + "cat " * 90], ["--system is too long: "]),
        ([run], ["model.safetensors"]),
    ):
        assert here("chat", *arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        for word in words:
            assert word in err
    out = piped(monkeypatch, capsys, "who?", finished, f"--template={EXAMPLE}", "--max_new_tokens=4", "--system=")
    assert out.endswith("\n")


def test_many_conversations_are_answered_as_in_a_chat(chatted: Path, tmp_path: Path, monkeypatch, capsys):
    turns = [{"role": "user", "content": "who is cat 7?"}]
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"messages": turns, "id": 1},
        {"prompt": "the cat"},
        {"messages": [{"role": "system", "content": "s"}, *turns]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--greedy", "--max_new_tokens=6")
    assert here("generate", chatted, f"--prompts={file}", *flags) == 0
    texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{name: line[name] for name in given} for line, given in zip(texts, lines, strict=True)] == lines
    assert texts[0]["text"] + "\n" == piped(monkeypatch, capsys, "who is cat 7?", chatted, *flags)
    assert texts[2]["text"] + "\n" == piped(monkeypatch, capsys, "who is cat 7?", chatted, "--system=s", *flags)
    assert here("generate", chatted, "--prompt=the cat", *flags) == 0
    assert capsys.readouterr().out == "the cat" + texts[1]["text"]
    bad = [{"messages": []}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a <|endoftext|>"}]}]
    bad += [{"messages": [{"role": "user", "content": "cat " * 99}]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in bad))
    assert here("generate", chatted, f"--prompts={file}", *flags) == 2
    err = capsys.readouterr().err
    for number, words in (
        (1, "does not end with a turn"),
        (3, "turn 1 holds '<|endoftext|>'"),
        (4, "but the model sees 64"),
    ):
        assert any(f"prompts.jsonl:{number}: " in line and words in line for line in err.splitlines()), err
    file.write_text('{"messages": [], "prompt": "a"}\n{"messages": "a"}\n')
    assert here("generate", chatted, f"--prompts={file}") == 2
    assert capsys.readouterr().err.count('or a list as its "messages"') == 2


def read_until(descriptor: int, words: str, again: bytes = b"") -> str:
    """What a program writes to its terminal, until some words come; after ten silent seconds `again` is typed."""
    found, deadline = "", time.monotonic() + 300
    while words not in found:
        assert time.monotonic() < deadline, found
        if select.select([descriptor], [], [], 10)[0]:
            found += os.read(descriptor, 4096).decode(errors="replace")
        else:
            os.write(descriptor, again)
    return found


def test_a_chat_on_a_terminal_asks_answers_and_survives_ctrl_c(chatted: Path):
    ours, theirs = pty.openpty()
    # A session of its own makes the terminal the one from which Ctrl-C comes.
    setup = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    arguments = [sys.executable, "-m", "launch.cli", "chat", chatted, "--greedy", "--max_new_tokens=5"]
    process = subprocess.Popen(
        [sys.executable, "-c", setup, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment() | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        begin = read_until(ours, "> ")
        assert "\x1b[2m/help lists the commands" in begin
        os.write(ours, b"who is ca\x03")
        # One that comes between Python's prompt and its wait for a key is seen only with the next key.
        read_until(ours, "> ", again=b"\x03")
        # Longer than an interrupt would take to come once more.
        time.sleep(1.2)
        os.write(ours, b"who is cat 7?\n")
        answer = read_until(ours, "> ")
        assert "Traceback" not in answer
        os.write(ours, b"/nosuch\n")
        # Until the next prompt the terminal reads whole lines, and Ctrl-D is lost.
        assert "/nosuch: give one of" in read_until(ours, "> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
