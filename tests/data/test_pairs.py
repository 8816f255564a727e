"""Pairs of answers: what is one and what is not, and that rows hold each pair whole, once an epoch (C1, C2, C4, C9)."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus import Corpus, open_corpus
from data.errors import BadText, InputError
from data.formats import Conversations, Fields
from data.formats.jsonl import parse_line
from data.lengths import check_lengths
from data.mixture import Mixture, initial_positions, open_mixture, open_streams
from data.provenance import describe_row, summarize
from data.segmenter import make_segment, sequences_in
from tests.data.chat_templates import IM
from tests.data.formats.test_conversation import template_of
from tests.data.stand_in import ByteTokenizer, tokenize
from tests.peers import require

TEXTS = Fields(text="good", prompt="ask", rejected="bad")
WHOLE = Fields(conversations=Conversations("good", template_of(), last_only=True), rejected="bad")
AFTER_PROMPT = dataclasses.replace(WHOLE, prompt="ask")
CONFIG = DataConfig(
    text_field="good", prompt_field="ask", rejected_field="bad", segmentation="pack", segment_length=96,
    num_streams=2, chunk_bytes=2000, shuffle_window=1500, validation_fraction=0.1,
)  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def answers_of(record: dict[str, Any], fields: Fields) -> list[str]:
    """The parts of both texts that are trained on."""
    document = parse_line(json.dumps(record).encode(), fields)
    assert document.rejected is not None
    both = [(document.text, document.answers), document.rejected]
    return ["|".join(text[b:e] for b, e in spans or [(0, len(text))]) for text, spans in both]


def test_a_pair_is_written_in_three_ways():
    assert answers_of({"ask": "q", "good": "a", "bad": "b"}, TEXTS) == ["a", "b"]
    trained = [f"a{IM[1]}", f"b{IM[1]}"]
    both = {"good": [user("q"), assistant("a")], "bad": [user("q"), assistant("b")]}
    assert answers_of(both, WHOLE) == trained
    for good, bad in (("a", "b"), ([assistant("a")], [assistant("b")]), ([assistant("a")], "b")):
        for ask in ("q", [user("q")], [user("q"), assistant("x"), user("y")]):
            found = parse_line(json.dumps({"ask": ask, "good": good, "bad": bad}).encode(), AFTER_PROMPT)
            assert answers_of({"ask": ask, "good": good, "bad": bad}, AFTER_PROMPT) == trained
            if ask == "q":
                assert found == parse_line(json.dumps(both).encode(), WHOLE)


@pytest.mark.parametrize(
    ("fields", "record", "words"),
    [
        (TEXTS, {"ask": "q", "good": "a", "bad": "a"}, "fields 'good' and 'bad' are the same"),
        (TEXTS, {"ask": "q", "good": " \n", "bad": "a"}, "field 'good' is an empty answer"),
        (TEXTS, {"ask": "q", "good": "a", "bad": ""}, "field 'bad' is an empty answer"),
        (TEXTS, {"ask": "q", "good": "a"}, "has no field 'bad', only ask, good; see data.rejected_field"),
        (TEXTS, {"good": "a", "bad": "b"}, "has no field 'ask', only good, bad; see data.prompt_field"),
        (TEXTS, {"ask": "q", "good": "a", "bad": 7}, "field 'bad' is no text but int; see data.rejected_field"),
        (WHOLE, {"good": [user("q"), assistant("a")], "bad": 3}, "field 'bad' is no list of turns and no text but int"),
        (WHOLE, {"good": [user("q"), assistant("a")], "bad": [user("r"), assistant("b")]}, "turn 1 of 'good' is not"),
        (WHOLE, {"good": [user("q"), assistant("a")], "bad": [assistant("b")]}, "turn 1 of 'good' is not"),
        (
            WHOLE,
            {"good": [user("q"), assistant("a")], "bad": [user("q"), assistant("b"), user("r")]},
            "field 'bad' ends with a turn of 'user' and not of the assistant",
        ),
        (WHOLE, {"good": [user("q"), assistant("a")], "bad": [user("q"), assistant(" ")]}, "turn 2 is an empty answer"),
        (WHOLE, {"good": [user("q"), assistant("a")], "bad": [user("q"), assistant("a")]}, "are the same"),
        (AFTER_PROMPT, {"ask": "q", "good": "a", "bad": [user("b")]}, "field 'bad' has no turn of the assistant"),
        (AFTER_PROMPT, {"ask": None, "good": "a", "bad": "b"}, "field 'ask' is no list of turns and no text"),
    ],
)
def test_what_is_no_pair_is_said(fields: Fields, record: dict[str, Any], words: str):
    with pytest.raises(BadText) as caught:
        parse_line(json.dumps(record).encode(), fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_holds_the_same_pairs(tmp_path: Path):
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    texts = [{"ask": f"q{i}", "good": f"a{i}", "bad": f"b{i}"} for i in range(5)]
    turns = [{"ask": r["ask"], "good": [assistant(r["good"])], "bad": r["bad"]} for r in texts]
    for name, records in (("texts", texts), ("turns", turns)):
        parquet.write_table(arrow.Table.from_pylist(records), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = dataclasses.replace(CONFIG, num_streams=1, validation_fraction=0.0)
    of_turns = dataclasses.replace(config, messages_field="good")
    for name, settings in (("texts", config), ("turns", of_turns)):
        both = [
            open_corpus(str(tmp_path / f"{name}.{end}"), settings, template=template_of()).all_documents()
            for end in ("parquet", "jsonl")
        ]
        for one, other in zip(*both, strict=True):
            assert (one.text, one.prompt, one.answers, one.rejected) == (
                other.text, other.prompt, other.answers, other.rejected
            )  # fmt: skip
            assert one.rejected is not None
    (tmp_path / "text.txt").write_text("a\n")
    with pytest.raises(InputError, match="holds no pairs"):
        open_corpus(str(tmp_path / "text.txt"), config)


def write_pairs(file: Path, count: int = 120, seed: int = 0) -> Path:
    draw = random.Random(seed)
    word = lambda most: "".join(draw.choices("abcdefg ", k=draw.randrange(1, most)))
    records = [{"ask": f"{word(20)}?", "good": f"{i} {word(25)}", "bad": f"{i}, {word(12)}"} for i in range(count)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def mixture_of(file: Path, **changes: Any) -> Mixture:
    return open_mixture(dataclasses.replace(CONFIG, corpus=str(file), **changes), lambda: "")


def streams_of(mixture: Mixture, positions: np.ndarray | None = None) -> dict:
    begin = initial_positions(mixture, 2) if positions is None else positions
    return open_streams(mixture, ByteTokenizer(), tokenize, 0, range(2), begin)


def training_documents(corpus: Corpus) -> list[Any]:
    return [document for chunk in corpus.chunks for document in corpus.documents(chunk)]


def text_of(targets: np.ndarray) -> str:
    """The text of targets that reach to the end of a document."""
    assert targets[-1] == ByteTokenizer.eos_id
    return bytes(x - 1 for x in targets[:-1].tolist()).decode()


@pytest.mark.parametrize("last_trained", [True, False])
def test_an_epochs_rows_hold_each_pair_once_and_whole_and_resume_anywhere(last_trained: bool, tmp_path: Path):
    mixture = mixture_of(write_pairs(tmp_path / "pairs.jsonl"), epochs=1, train_last_position=last_trained)
    config, found, sizes = mixture.sources[0].config, Counter(), set()
    for v, stream in streams_of(mixture).items():
        taken: list[tuple[list[int], np.ndarray]] = []
        while parts := stream.take(0)[1]:
            row = make_segment(parts, config)
            taken.append((row["tokens"].tolist(), stream.positions))
            answers = [*sequences_in(parts)]
            sizes.add(len(answers))
            for number, (pairs, begin, end) in enumerate(answers, start=1):
                here, document = row["segment_ids"] == number, pairs.document
                assert (begin, end) == (0, here.sum()) == (0, len(pairs.inputs))
                assert row["positions"][here].tolist() == [*range(end)]
                assert text_of(row["targets"][here]) == document.prompt + document.text
                assert text_of(row["targets"][here & (row["loss_weights"] > 0)]) == document.text
                if number % 2:
                    other = answers[number].pairs.document
                    assert other.place == document.place
                    found[document.place, document.text, other.text] += 1
        # C4: from the position after each row the next is the same.
        for (_, after), (following, _) in itertools.pairwise(taken):
            positions = initial_positions(mixture, 2)
            positions[v] = after
            parts = streams_of(mixture, positions)[v].take(0)[1]
            assert make_segment(parts, config)["tokens"].tolist() == following
    documents = training_documents(mixture.sources[0].corpus)
    assert found == Counter((d.place, d.text, d.rejected.text) for d in documents)
    # Several pairs share rows.
    assert max(sizes) >= 4


def test_a_row_and_a_summary_show_pairs(tmp_path: Path):
    mixture = mixture_of(write_pairs(tmp_path / "pairs.jsonl"))
    tokenizer: Any = ByteTokenizer()
    tokenizer.adds_space, tokenizer.token_bytes = False, lambda token: bytes([token - 1])
    _, parts = streams_of(mixture)[0].take(0)
    described = describe_row(mixture, tokenizer, 0, 0, parts)["parts"]
    assert [part["answer"] for part in described] == ["chosen", "rejected"] * len(parts)
    lines = (tmp_path / "pairs.jsonl").read_bytes()
    for part in described:
        record = json.loads(lines[part["byte"] :].split(b"\n", 1)[0])
        assert part["text"] == record["ask"] + record["good" if part["answer"] == "chosen" else "bad"]
        assert part["prompt_characters"] == len(record["ask"])
        assert part["tokens"] == len(part["text"]) + 1
        assert part["end"]
    summary = summarize(mixture, tokenizer, 0, [(0, 10, 960)])[0]
    documents = training_documents(mixture.sources[0].corpus)
    positions = sum(2 * len(d.prompt) + len(d.text) + len(d.rejected.text) + 2 for d in documents)
    assert summary["tokens"] == pytest.approx(positions, rel=0.2)
    assert 0.3 < summary["trained"] < 0.9


def test_a_pair_longer_than_a_row_is_said_with_its_line_or_left_out(tmp_path: Path):
    file = write_pairs(tmp_path / "pairs.jsonl", 40)
    lines = file.read_text().splitlines()
    lines[6] = json.dumps({"ask": "q" * 30, "good": "a" * 20, "bad": "b" * 30})
    # One token more than a row has positions, and exactly as many.
    lines[7] = json.dumps({"ask": "q" * 20, "good": "a" * 25, "bad": "b" * 30})
    lines[8] = json.dumps({"ask": "q" * 20, "good": "a" * 25, "bad": "b" * 29})
    file.write_text("\n".join(lines) + "\n")
    tokenizer: Any = ByteTokenizer()
    tokenizer.encode_all = tokenize
    with pytest.raises(InputError) as caught:
        check_lengths(mixture_of(file), tokenizer)
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        f"{file}:7: the pair takes 112 positions, 51 for the chosen answer with its prompt and 61 for the rejected"
    )
    assert "give data.segment_length=112 or more; mend it, or leave it out with data.on_bad_document=skip" in first
    assert second.startswith(f"{file}:8: the pair takes 97 positions")
    with pytest.raises(InputError, match=f"{file}:(7|8): the pair takes"):
        for stream in streams_of(mixture_of(file, epochs=1)).values():
            while stream.take(0)[1]:
                pass
    mixture = mixture_of(file, epochs=1, on_bad_document="skip", validation_fraction=0.0)
    check_lengths(mixture, tokenizer)
    rows = []
    for stream in streams_of(mixture).values():
        while parts := stream.take(0)[1]:
            rows += parts
    assert len(rows) == 38
    assert mixture.skipped == 2


def test_what_does_not_go_with_pairs_is_said():
    def problems(**changes: Any) -> str:
        return "\n".join(dataclasses.replace(CONFIG, corpus="c", **changes).problems())

    assert problems() == ""
    assert "data.segmentation is concatenate" in problems(segmentation="concatenate")
    assert "needs data.document_mask and data.restart_positions" in problems(document_mask=False)
    assert "needs data.document_mask and data.restart_positions" in problems(restart_positions=False)
    assert "data.fim_rate has no effect with data.rejected_field" in problems(fim_rate=0.5)
    assert "data.train_on has no effect with data.rejected_field" in problems(messages_field="m", train_on="last")
    assert "data.rejected_field is ''; it must be a text" in problems(rejected_field="")
    several = {"a": {"corpus": "a", "rejected_field": "r"}, "b": {"corpus": "b"}}
    mixed = dataclasses.replace(CONFIG, rejected_field=None, corpus=several)
    assert "some corpora of the mixture hold pairs and some do not" in "\n".join(mixed.problems())
    both = {"a": {"corpus": "a", "messages_field": "m", "prompt_field": "p"}}
    assert dataclasses.replace(CONFIG, corpus=both).problems() == []
