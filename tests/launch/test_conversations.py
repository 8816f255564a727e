"""A run on conversations: what it reads and shows, that it resumes exactly, and what it hands on (C1, C4, C7, C9)."""

import json
import re
from pathlib import Path

from data.chat import Prompts
from data.config import DataConfig
from data.conversations import open_template
from data.formats import Conversations
from data.tokenizer.folder import load_tokenizer
from launch.inspect_data import DIM, GREEN, PLAIN, masked, row_text
from tests.data import chat_templates
from tests.data.chat_templates import IM, PUBLISHED
from tests.launch.small_chats import EXAMPLE, FLAGS, flags_of
from tests.launch.small_run import back_to, here, metrics, write_config
from tests.launch.test_pretrain import assert_same_end, without_times
from tests.llama_cpp import LlamaCpp
from tests.peers import require
from train.run.folder import Run


def test_a_run_resumes_within_its_conversations(chatted: Path, tmp_path: Path, capsys):
    again = back_to(3, chatted, tmp_path / "again")
    assert here("pretrain", f"--config={again}") == 0
    assert_same_end(again, chatted, 6)
    assert without_times(metrics(again))[-3:] == without_times(metrics(chatted))[-3:]
    other = tmp_path / "other.jinja"
    other.write_text(EXAMPLE.read_text() + "!")
    capsys.readouterr()
    assert here("pretrain", f"--config={again}", f"--config.data.chat_template={other}") == 2
    assert "is not the template that the run in" in capsys.readouterr().err


def test_a_batch_shows_what_is_trained_on(chatted: Path, capsys):
    capsys.readouterr()
    assert here("inspect", "data", chatted, "--step=2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    chats = [part for row in rows if row["corpus"] == "chats" for part in row["parts"]]
    assert len(chats) > 5
    for part in chats:
        first, _ = part["characters"]
        answers = [part["text"][begin - first : end - first] for begin, end in part["trained"]]
        assert all(re.fullmatch(r"my (cat|dog|bird|fish)\.<\|endoftext\|>", answer) for answer in answers)
        assert len(answers) == part["text"].count("assistant")
    tokens = [sum(p.get("trained_tokens", p["tokens"]) for row in rows for p in row["parts"])]
    assert tokens == [metrics(chatted)[1]["loss_weight"]]
    # In color on a terminal alone.
    assert "\x1b" not in row_text(rows[0])
    colored = masked(chats[0])
    assert re.sub(r"\x1b\[\d+m", "", colored) == chats[0]["text"]
    green = re.findall(re.escape(GREEN) + r"(.*?)" + re.escape(PLAIN), colored)
    assert green == [chats[0]["text"][b:e] for b, e in chats[0]["trained"]]
    assert colored.startswith(DIM)
    assert here("inspect", "data", chatted, "--summary", "--json") == 0
    of_chats, of_web = json.loads(capsys.readouterr().out)["corpora"]
    assert 0.1 < of_chats["trained"] < 0.6
    assert of_web["trained"] == 1
    assert here("inspect", "data", chatted, "--summary") == 0
    assert capsys.readouterr().out.count("trained on ") == 1


def test_held_out_conversations_are_scored_by_their_answers(chatted: Path, tmp_path: Path, capsys):
    held_out = [document for document in Run(chatted).held_out_texts() if document.corpus == "chats"]
    assert held_out
    assert all(document.scored.count("my ") == len(document.answers) for document in held_out)
    turns = [{"role": "user", "content": "who is cat 7?"}, {"role": "assistant", "content": "my dog."}]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = json.loads((chatted / "config.json").read_text())
    alone = Path(str(chatted) + "_alone")
    flags = [f"--config={write_config(tmp_path)}", f"--config.data.corpus={chatted.parent / 'chats.jsonl'}", *FLAGS]
    flags += [
        "--config.data.messages_field=messages",
        f"--config.train.init_from={chatted}@6",
        "--config.train.init_with=weights",
    ]
    flags += [f"--config.train.run_dir={alone}", f"--config.tokenizer.vocab_size={config['tokenizer']['vocab_size']}"]
    assert here("pretrain", *flags) == 0
    capsys.readouterr()
    assert here("evaluate", alone, f"--corpus={tmp_path / 'one.jsonl'}", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    # The end is scored, and counts no byte.
    assert figures["bytes"] == len("my dog.")
    assert figures["tokens"] == len(load_tokenizer(alone / "tokenizer").encode("my dog.")) + 1


def prompts_and_ids(folder: Path) -> list[tuple[list[dict[str, str]], list[int]]]:
    """Conversations with a question last, and the ids that a model is trained to answer after."""
    tokenizer = load_tokenizer(folder)
    template = open_template(DataConfig(messages_field="messages"), tokenizer)
    made = []
    for turns in (
        [{"role": "user", "content": "who is cat 7?"}],
        [{"role": "system", "content": "be short"}, {"role": "user", "content": " é 漢\n\nwhy?"}],
        [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "my dog."), ("user", "b  c"))],
    ):
        prompt = template.render(turns, prompts=True)
        answered = Conversations("messages", template).document([*turns, {"role": "assistant", "content": "my cat."}])
        ids, _ = tokenizer.encode_marked(answered.text)
        before, _ = tokenizer.encode_marked(prompt)
        assert ids[: len(before)].tolist() == before.tolist()
        assert Prompts(tokenizer).ids(turns) == before.tolist()
        made.append((turns, before.tolist()))
    return made


def check_exports(run: Path, gguf: Path) -> None:
    """Transformers and llama.cpp give the ids that training saw."""
    require("gguf")
    theirs = require("transformers").AutoTokenizer.from_pretrained(run / "export")
    assert here("export", run, "--format=gguf", f"--to={gguf}") == 0
    served = LlamaCpp(gguf, context=512)
    for turns, ids in prompts_and_ids(run / "tokenizer"):
        assert theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"] == ids
        assert served.conversation(turns) == ids


def test_exports_of_our_own_tokenizer_give_the_ids_of_training(chatted: Path, tmp_path: Path):
    assert (chatted / "export" / "chat_template.jinja").read_text() == EXAMPLE.read_text()
    check_exports(chatted, tmp_path / "model.gguf")


def test_exports_of_another_tokenizer_give_the_ids_of_training_and_stop_at_an_answers_end(tmp_path: Path):
    # A base model's tokenizer, whose text does not end where an answer does.
    base = PUBLISHED["chatml"]._replace(eos=PUBLISHED["chatml"].bos)
    folder = chat_templates.write(tmp_path / "base", base, None)
    assert here("pretrain", *flags_of(tmp_path), f"--config.tokenizer.path={folder}") == 0
    run = tmp_path / "run"
    check_exports(run, tmp_path / "model.gguf")
    for of in (run / "tokenizer", run / "export"):
        tokenizer = load_tokenizer(of)
        assert tokenizer.stop_ids == [tokenizer.eos_id, tokenizer.pieces.index(IM[1])]


def test_what_a_user_gets_wrong_is_said(tmp_path: Path, capsys):
    start = ["pretrain", *flags_of(tmp_path)]
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}")
    for flags, words in (
        ([], "data.messages_field: a tokenizer that the run trains has no chat template; name a file"),
        ([f"--config.data.chat_template={tmp_path / 'none'}"], "there is no such file; name a Jinja file"),
        ([f"--config.data.chat_template={broken}"], "broken.jinja, line 1: Unexpected end of template"),
        (
            ["--config.data.corpus=stdlib", "--config.data.train_on=last"],
            "data.train_on has no effect with data.messages_field = none; leave it at answers",
        ),
        (
            ["--config.data.messages_field=m", "--config.data.prompt_field=p"],
            "data.prompt_field is not used with data.messages_field",
        ),
    ):
        capsys.readouterr()
        assert here(*start, *flags) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run" / "config.json").exists()
