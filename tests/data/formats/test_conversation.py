"""Conversations as they are read: what is wrong with turns or a template is one line, and no mask is a guess."""

import gzip
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataConfig
from data.corpus import open_corpus
from data.errors import BadText, InputError
from data.formats import Conversations
from data.formats.template import ChatTemplate
from tests.data import chat_templates
from tests.data.chat_templates import CHATML, IM, TAG
from tests.peers import require

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CONFIG = DataConfig(messages_field="messages", num_streams=1, validation_fraction=0.0)


def template_of(source: str = CHATML, marks: tuple[str, ...] = IM) -> ChatTemplate:
    names = {"bos_token": "<s>", "eos_token": marks[-1]}
    return ChatTemplate(TAG.sub("", source), "its.jinja", names, marks)


def problem(turns: Any, template: ChatTemplate | None = None, last_only: bool = False) -> str:
    with pytest.raises(BadText) as caught:
        Conversations("messages", template or template_of(), last_only).document(turns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("hello", "field 'messages' is no list of turns but str; see data.messages_field"),
        (None, "is no list of turns but NoneType"),
        ([], "has no turn of the assistant, so nothing to train on"),
        ([USER, "yes"], "turn 2 is no object but str"),
        ([{"content": "q"}, ANSWER], "turn 1 has no role that is a text, only content"),
        ([{"from": "human", "value": "q"}], "turn 1 has no role that is a text, only from, value"),
        ([USER | {"role": ""}], "turn 1 has no role that is a text, ''"),
        ([USER, {"role": "assistant"}], "turn 2 has no content that is a text, only role"),
        ([USER, ANSWER | {"content": None}], "turn 2 has no content that is a text, only role"),
        ([USER | {"content": [{"type": "text", "text": "q"}]}], "turn 1 has no content that is a text, [{"),
        ([USER], "has no turn of the assistant"),
        ([USER, ANSWER | {"content": " \n"}], "turn 2 is an empty answer"),
        (
            [USER | {"content": "a<|im_end|>b"}, ANSWER],
            "turn 1 holds '<|im_end|>', which the tokenizer reads as a mark",
        ),
        ([USER, ANSWER | {"name": ["<|im_start|>"]}], "turn 2 holds '<|im_start|>'"),
        ([USER, ANSWER | {"content": "\ud800"}], "field 'messages' has half a character: '\\ud800'"),
    ],
)
def test_what_is_wrong_with_turns_is_said(turns: Any, words: str):
    assert words in problem(turns)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
            "for more than 20,000 turns",
        ),
        ("{% for i in range(9**5) if i > 9**6 %}{% endfor %}" * 20, "for more than 20,000 turns"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "maximum recursion depth"),
        ("{% for i in range(70) %}{{ 'a' * 10**6 }}{% endfor %}", "it writes more than 67,108,864 characters"),
        ("{{ 'a' * 10**9 }}", "its operator * makes something too large"),
        ("{{ 9**9**9 }}", "its operator ** makes something too large"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[5].content.x }}", "has no element 5"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ raise_exception('Roles\nmust alternate') }}", "its.jinja does not render it: Roles must alternate"),
        (
            "{% for m in messages %}{{ m.role | upper }}{% endfor %}",
            "turn 2: the chat template of its.jinja leaves out a part",
        ),
    ],
)
def test_what_is_wrong_with_a_template_is_said(source: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.formats.template.MAX_TURNS", 20_000)
    assert words in problem([USER, ANSWER], template_of(source))


def test_an_error_of_syntax_is_said_with_its_line():
    for source, words in (
        ("\n{% for m in messages %}", "the chat template of its.jinja, line 2: Unexpected end of template"),
        ("{{ a | random }}", "line 1: No filter named 'random'"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            template_of(source)


def test_a_template_that_writes_the_past_otherwise_is_refused_unless_the_last_answer_alone_is_trained():
    several = [USER, ANSWER, USER, ANSWER]
    for source in (chat_templates.QWEN3_THINKS, chat_templates.QWEN3_PLAIN, chat_templates.OLMO3):
        assert (
            "turn 2: the chat template" in problem(several, template_of(source)) or source == chat_templates.QWEN3_PLAIN
        )
        assert "data.train_on=last" in problem(several, template_of(source))
        Conversations("messages", template_of(source), last_only=True).document(several)
        Conversations("messages", template_of(source)).document(several[:2])
    # A system's text that no answered question has.
    moved = template_of(chat_templates.MISTRAL_MOVES_SYSTEM, ("</s>",))
    assert "turn 3: the chat template of its.jinja writes the turns before this answer otherwise" in problem(
        [{"role": "system", "content": "s"}, USER, ANSWER], moved
    )
    # An answer that comes first, where the template asks for a question.
    assert "turn 1: the turns before this answer: the chat template of its.jinja does not render it: list " in problem(
        [ANSWER], template_of("{{ messages[0].content }}" * 2)
    )
    # A thought that no text has.
    thinks = [USER, ANSWER | {"content": "<think>hm</think>a"}]
    assert "leaves out a part of this answer" in problem(thinks, template_of(chat_templates.DEEPSEEK_R1))


def test_fields_beyond_role_and_content_reach_the_template_but_no_null():
    name = "{{ 'none' if m.name is defined and m.name is none else m.name }}"
    source = f"{{% for m in messages %}}{name}{{{{ m.content }}}}{{% endfor %}}"
    document = Conversations("messages", template_of(source)).document(
        [USER | {"name": "I"}, ANSWER | {"name": None, "tool_calls": None}]
    )
    assert document.text == "Iqa"
    assert document.answers == ((2, 3),)


def test_threads_count_the_turns_of_their_own_renderings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.formats.template.MAX_TURNS", 300)
    template, texts = template_of("{% for i in range(200) %}{{ messages[0].content }}{% endfor %}"), []
    threads = [threading.Thread(target=lambda: texts.append(template.render([USER]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["q" * 200] * 4


CONTENTS = st.sampled_from(["a", "", " b\n", "<think>c</think>", "<|im_end|>", "é\ud800"])
ODD = st.none() | st.booleans() | st.integers() | st.floats() | CONTENTS | st.lists(CONTENTS, max_size=2)
ROLES = st.sampled_from(["system", "user", "assistant", "assistant", "tool"])
TURNS = st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}) | st.fixed_dictionaries(
    {}, optional={"role": ROLES | ODD, "content": CONTENTS | ODD, "name": ODD}
)


@given(turns=st.lists(TURNS | ODD, max_size=6) | ODD, name=st.sampled_from(["CHATML", "QWEN3_THINKS", "SMOLLM3"]))
def test_any_value_is_a_conversation_whose_answers_are_whole_or_one_line(turns: Any, name: str):
    document, said = None, "a line"
    try:
        document = Conversations("messages", template_of(getattr(chat_templates, name))).document(turns)
    except BadText as error:
        said = str(error)
    assert said.isprintable()
    if document is None:
        return
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    for answer, (begin, end) in zip(answers, document.answers, strict=True):
        assert document.text[begin:end].endswith("<|im_end|>")
        assert document.text[begin:end].count("<|im_") == 1
        assert answer.strip() in document.text[begin:end] or name == "QWEN3_THINKS"
        assert document.text[:begin].endswith("assistant\n")


def conversation(i: int) -> list[dict[str, str]]:
    return [USER | {"content": f"{i}?"}, ANSWER | {"content": f"{i}!"}]


def test_lines_and_rows_give_the_same_documents(tmp_path: Path):
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    turns = [conversation(i) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "messages": t}) + "\n" for t in turns))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    # Structs have every field in every turn.
    rows = [[turn | {"name": None} for turn in t] for t in turns]
    kind = arrow.list_(arrow.struct({name: arrow.string() for name in ("role", "content", "name")}))
    columns = {"messages.x": ["y"] * 40, "messages": arrow.array(rows, kind)}
    parquet.write_table(arrow.table(columns), tmp_path / "c.parquet", row_group_size=7)
    read = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        corpus = open_corpus(str(tmp_path / name), CONFIG, template=template_of())
        corpus.check()
        read.append([(document.text, document.answers) for document in corpus.all_documents()])
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 40
    text, [(begin, end)] = read[0][7]
    assert text == "<|im_start|>user\n7?<|im_end|>\n<|im_start|>assistant\n7!<|im_end|>\n"
    assert text[begin:end] == "7!<|im_end|>"
    # What a tokenizer learns from has no marks.
    learned = "".join(open_corpus(str(tmp_path / "a.jsonl"), CONFIG, template=template_of()).training_texts(0))
    assert "7?" in learned
    assert "<|im_" not in learned


def test_a_bad_conversation_is_named_by_its_line_or_skipped(tmp_path: Path):
    lines = [{"messages": conversation(i)} for i in range(10)]
    lines[3] = {"messages": [USER, ANSWER | {"content": ""}]}
    lines[7] = {"turns": []}
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = open_corpus(str(file), CONFIG, template=template_of())
    with pytest.raises(InputError) as caught:
        corpus.check()
    assert f"{file}:4: turn 2 is an empty answer; mend it, or leave it out" in str(caught.value)
    skipping = DataConfig(**vars(CONFIG) | {"on_bad_document": "skip"})
    assert len([*open_corpus(str(file), skipping, template=template_of()).all_documents()]) == 8


def test_files_that_hold_no_conversations_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="a.txt holds no conversations"):
        open_corpus(str(tmp_path), CONFIG, template=template_of())
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    for name, values in (("messages", ["x"]), ("messages", [["x"]]), ("other", ["x"])):
        parquet.write_table(arrow.table({name: values}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match="data.messages_field"):
            open_corpus(str(tmp_path / "a.parquet"), CONFIG, template=template_of()).check()
