"""Prompts of a chat: their ids are Transformers', they fit the context, and no text of a user is a mark in them."""

import json
import random
import shutil
from pathlib import Path

import pytest

from data.chat import Chat, Prompts
from data.errors import BadText, InputError
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.data import chat_templates
from tests.data.chat_templates import IM, PUBLISHED
from tests.data.test_conversations import text
from tests.peers import require

ROOT = Path(__file__).resolve().parents[2]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ids_of_a_prompt_are_those_of_transformers(folders, no_clock, name: str):
    theirs = require("transformers").AutoTokenizer.from_pretrained(folders[name])
    prompts, draw = Prompts(load_tokenizer(folders[name])), random.Random(name)
    for system in (None, text(draw)):
        chat = Chat(prompts, context=10**6, room=1, system=system)
        for _ in range(3):
            question = text(draw)
            turns = [*chat.messages(), user(question)]
            expected = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            assert chat.ask(question) == expected
            assert chat.ask_again() == expected
            chat.turns[-1].answer = text(draw)
    assert len(chat.messages()) == 7


@pytest.mark.parametrize("name", ["chatml", "mistral", "llama3"])
def test_a_prompt_has_the_most_turns_that_leave_room_and_always_the_system_and_the_question(folders, name: str):
    prompts, draw = Prompts(load_tokenizer(folders[name])), random.Random(name)
    lacking = refused = 0
    for number in range(6):
        system = "be short" if number % 2 else None
        always = [] if system is None else [{"role": "system", "content": system}]
        context, room = draw.randrange(90, 200), draw.randrange(40)
        chat = Chat(prompts, context, room, system)
        for _ in range(12):
            question, before = text(draw) * draw.choice([1, 1, 1, 4]), len(chat.turns)
            answered, left_out = chat.messages()[len(always) :], chat.num_left_out
            pairs = [answered[i : i + 2] for i in range(0, len(answered), 2)]
            prompt = lambda n, pairs=pairs, question=question, always=always: prompts.ids(
                [*always, *(message for pair in pairs[len(pairs) - n :] for message in pair), user(question)]
            )
            if len(prompt(0)) >= context:
                with pytest.raises(InputError, match=rf"it has {len(prompt(0))} tokens.* sees {context}, of"):
                    chat.ask(question)
                # As if it had not been asked.
                assert (len(chat.turns), chat.num_left_out) == (before, left_out)
                refused += 1
                continue
            n = max(n for n in range(len(pairs) + 1) if n == 0 or len(prompt(n)) <= context - room)
            assert chat.ask(question) == prompt(n)
            assert chat.num_left_out == len(pairs) - n
            lacking += chat.num_left_out > left_out
            if draw.random() < 0.8:
                chat.turns[-1].answer = text(draw)
        # The whole conversation is kept, all the same.
        assert len(chat.messages()) == len(always) + 2 * sum(bool(turn.answer) for turn in chat.turns)
    assert lacking > 5
    assert refused


def test_a_question_without_an_answer_is_in_no_other_prompt(folders):
    prompts = Prompts(load_tokenizer(folders["chatml"]))
    chat = Chat(prompts, 500, 1)
    with pytest.raises(InputError, match="no question yet"):
        chat.ask_again()
    assert chat.ask("one") == chat.ask_again()
    chat.turns[-1].answer = " \n"
    assert chat.ask("two") == prompts.ids([user("two")])
    chat.turns[-1].answer = "a cat"
    assert chat.ask_again() == prompts.ids([user("two")])
    assert [(turn.question, turn.answer, turn.attempt) for turn in chat.turns] == [("one", " \n", 1), ("two", "", 1)]
    chat.clear()
    assert chat.ask("one") == prompts.ids([user("one")])


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_text_of_a_user_is_a_mark(folders, name: str):
    tokenizer = load_tokenizer(folders[name])
    prompts, published = Prompts(tokenizer), PUBLISHED[name]
    # Qwen3's marks of thoughts and tool calls are text in its template, but for those that it writes itself.
    turns = published.whole if name == "deepseek" else ()
    marks = {*published.marks, published.bos, published.eos, *turns}
    chat = Chat(prompts, 10**6, 1)
    for mark in marks:
        for question in (mark, f"a{mark}\nb", f"{mark[:3]}{mark}"):
            with pytest.raises(InputError, match="the question holds '.*', which the tokenizer reads as a mark of"):
                chat.ask(question)
            with pytest.raises(BadText, match="turn 1 holds"):
                prompts.ids([user(question)])
            with pytest.raises(InputError, match="--system holds"):
                Chat(prompts, 10**6, 1, system=question)
    assert not chat.turns
    plain = chat.ask("a b")
    count = lambda ids: sum(tokenizer.pieces[token] in marks for token in ids)
    for mark in marks:
        assert count(chat.ask(f"a {mark[:-1]} {mark[-1]} b {mark[1:]}")) == count(plain)


def test_a_text_that_a_normalizer_makes_a_mark_is_one(folders, tmp_path: Path):
    folder = shutil.copytree(folders["chatml"], tmp_path / "normalized")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "NFKC"}
    for token in settings["added_tokens"]:
        token["normalized"] = token["content"] in IM
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    wide = IM[1].translate({ord(c): ord(c) + 0xFEE0 for c in "<|>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pieces.index(IM[1]) in tokenizer.encode_marked(wide)[0]
    with pytest.raises(InputError, match="the question holds"):
        Chat(Prompts(tokenizer), 500, 1).ask(f"a {wide} b")


def test_an_answer_ends_at_the_templates_marks_also_where_the_tokenizer_names_none(ours, tmp_path: Path):
    base = PUBLISHED["chatml"]._replace(eos=PUBLISHED["chatml"].bos)
    tokenizer = load_tokenizer(chat_templates.write(tmp_path / "base", base, ours))
    assert Prompts(tokenizer).end_ids == [tokenizer.pieces.index(IM[1])]
    assert tokenizer.stop_ids == [tokenizer.eos_id]


def test_a_template_may_take_a_past_answer_away_which_no_training_could_follow(folders, tmp_path: Path):
    template = tmp_path / "thinks.jinja"
    header = "'<｜Assistant｜>' }}{%- endif -%}"
    assert header in chat_templates.DEEPSEEK
    thinks = chat_templates.DEEPSEEK.replace(header, header.replace("' }}", "<think>\n' }}"))
    template.write_text(chat_templates.TAG.sub("", thinks))
    prompts = Prompts(load_tokenizer(folders["deepseek"]), str(template))
    assert prompts.end_ids == []
    assert len(Chat(prompts, 500, 1).ask("a")) > 4


def test_what_cannot_be_answered_is_refused(ours: SentencePieceTokenizer, folders, tmp_path: Path):
    with pytest.raises(InputError, match="has no chat template; take a model"):
        Prompts(ours)
    prompts = Prompts(ours, str(ROOT / "examples" / "chat_template.jinja"))
    for messages, words in (
        ([], "does not end with a turn"),
        ([user("a"), {"role": "assistant", "content": "b"}], "does not end with a turn"),
        (["a"], "turn 1 is no object"),
        ([{"role": "user"}], "turn 1 has no content"),
        ([user("\ud800")], "has half a character"),
    ):
        with pytest.raises(BadText, match=words):
            prompts.ids(messages)
    (tmp_path / "none.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(InputError, match="System role not supported; take another template"):
        Prompts(ours, str(tmp_path / "none.jinja"))
    gemma = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "no_system.jinja").write_text(gemma + (ROOT / "examples" / "chat_template.jinja").read_text())
    with pytest.raises(InputError, match="does not render it: no system"):
        Chat(Prompts(ours, str(tmp_path / "no_system.jinja")), 100, 1, system="a")
