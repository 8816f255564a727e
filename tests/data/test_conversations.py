"""Conversations: ids and masks are those of published templates, as Transformers renders them."""

import dataclasses
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.conversations import conversation_pairs, open_template, trained_tokens
from data.formats import Conversations
from data.mixture import initial_positions, open_mixture, open_streams
from data.segmenter import SegmentPart, make_segment
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import Tokenizer
from tests.data.chat_templates import PUBLISHED, Published
from tests.data.test_stream import pairs_in
from tests.peers import require

CONFIG = DataConfig(messages_field="messages")
ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the", "cat", "eats", "42", "漢字", "🙂", "e\u0301", "x = f(1)", "\n", "    ", "Don't!", "…", "<b>", "\n\n", "\t",
    "é", "im_end", "<|", "[/", "assistant", "user",
]  # fmt: skip
Turns = list[dict[str, Any]]


def text(draw: random.Random) -> str:
    return draw.choice(["", " ", "\n"]) + draw.choice(WORDS[:6]) + " ".join(draw.choices(WORDS, k=draw.randrange(12)))


def drawn(draw: random.Random, published: Published, answers: int) -> Turns:
    """A conversation with this number of answers, whose contents may begin and end with whitespace."""
    turns = [{"role": "system", "content": text(draw)}] if draw.random() < 0.5 else []
    for _ in range(answers):
        asks = "tool" if turns and turns[-1]["role"] == "assistant" and draw.random() < 0.3 else "user"
        turns.append({"role": asks if asks in (*published.roles, "user") else "user", "content": text(draw)})
        thought = f"<think>\n{text(draw).strip()}\n</think>\n\n" if published.thinks else ""
        turns.append({"role": "assistant", "content": (thought if draw.random() < 0.5 else "") + text(draw)})
    return turns


def conversations(tokenizer: Tokenizer, last_only: bool = False) -> Conversations:
    template = open_template(CONFIG, tokenizer)
    assert template is not None
    return Conversations("messages", template, last_only)


def by_transformers(folder: Path, published: Published, turns: Turns) -> tuple[list[int], list[int]]:
    """The ids of the template as it is, and the mask of the template with the tag."""
    theirs = require("transformers").AutoTokenizer.from_pretrained(folder)
    plain = theirs.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    marked = theirs.apply_chat_template(
        turns,
        chat_template=published.template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert marked["input_ids"] == plain
    return plain, marked["assistant_masks"]


def last_run(mask: list[int]) -> list[int]:
    """The mask with its last run of ones alone."""
    end = len(mask) - mask[::-1].index(1)
    begin = end - next((i for i, one in enumerate(mask[:end][::-1]) if not one), end)
    return [int(begin <= i < end) for i in range(len(mask))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_and_masks_are_those_of_transformers(folders, no_clock, name: str):
    published, draw = PUBLISHED[name], random.Random(name)
    tokenizer = load_tokenizer(folders[name])
    several = 0
    for number in range(12):
        answers = 1 + number % 3
        turns = drawn(draw, published, answers)
        last_only = number % 4 == 0 or (published.rewrites and answers > 1)
        document = conversations(tokenizer, last_only).document(turns)
        ids, mask = by_transformers(folders[name], published, turns)
        found, spans_n2 = tokenizer.encode_marked(document.text)
        assert found.tolist() == ids
        trained = trained_tokens(document.text, spans_n2, document.answers)
        assert trained.astype(int).tolist() == (last_run(mask) if last_only else mask)
        assert 0 < trained.sum() < len(ids)
        several += len(document.answers) > 1
        pairs = conversation_pairs(tokenizer.encode_marked, document.text, document.answers)
        assert [*pairs.inputs, pairs.targets[-1]] == ids
        assert pairs.trained.tolist() == trained[1:].tolist()
    assert several or published.rewrites


@pytest.mark.parametrize("segmentation", ["pack", "concatenate"])
@pytest.mark.parametrize("T", [16, 200])
def test_an_epoch_trains_once_on_every_answer_and_resumes(folders, tmp_path: Path, segmentation: str, T: int):
    tokenizer, draw = load_tokenizer(folders["chatml"]), random.Random(T)
    lines = [{"messages": drawn(draw, PUBLISHED["chatml"], 1 + i % 3)} for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changes = {"segmentation": segmentation, "segment_length": T, "num_streams": 2, "shuffle_window": 5000, "epochs": 1}
    config = dataclasses.replace(CONFIG, corpus=str(tmp_path / "a.jsonl"), validation_fraction=0.2, **changes)
    mixture = open_mixture(config, lambda: "", template=open_template(config, tokenizer))
    corpus = mixture.sources[0].corpus
    begin = initial_positions(mixture, 2)
    rows: list[list[SegmentPart]] = []
    for v, stream in open_streams(mixture, tokenizer, tokenizer.encode_all, 0, range(2), begin).items():
        mine, positions = [], []
        while not stream.ended[0]:
            positions.append(stream.positions)
            mine.append(stream.take(0)[1])
        half = len(mine) // 2
        start = np.stack([positions[half]] * 2)
        again = open_streams(mixture, tokenizer, tokenizer.encode_all, 0, [v], start)[v]
        assert [row_of(again.take(0)[1], config) for _ in mine[half:]] == [row_of(row, config) for row in mine[half:]]
        rows += mine
    documents = [document for chunk in corpus.chunks for document in corpus.documents(chunk)]
    held_out = list(corpus.held_out())
    assert len(documents) + len(held_out) == 80
    assert held_out
    expected: Counter = Counter()
    for document in documents:
        pairs = conversation_pairs(tokenizer.encode_marked, document.text, document.answers)
        expected.update((document.file, document.place, pair) for pair in np.flatnonzero(pairs.trained).tolist())
    found = pairs_in(rows, config)
    assert +found == expected
    # What is not trained on is seen, all the same.
    assert sum(part.end - part.begin for parts in rows for part in parts) > 1.2 * sum(expected.values())


def row_of(parts: list[SegmentPart], config: DataConfig) -> dict[str, list[Any]]:
    return {name: array.tolist() for name, array in make_segment(parts, config).items()}


def test_without_conversations_jinja_is_not_imported():
    check = "import sys, data.mixture; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
