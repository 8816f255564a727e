"""What a reward is given, and what is said of one that does not work (C9)."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError
from tests.data.stand_in import TextTokenizer
from train.config.objective_config import ObjectiveConfig
from train.rollout.prompt import Prompt, answer_text, as_in_corpus, prompt_of, prompt_text
from train.rollout.reward import Answer, Reward

ANSWERS = [Answer("1+1=", "2", "2"), Answer("1+2=", "five", "3")]
FUNCTIONS = """
import time

def is_right(prompt, answer, reference):
    return answer == reference

def raises(prompt, answer, reference):
    return int(answer)

def leaves(prompt, answer, reference):
    raise SystemExit

def is_nan(prompt, answer, reference):
    return float("nan")

def is_text(prompt, answer, reference):
    return answer

def hangs(prompt, answer, reference):
    time.sleep(0 if answer == "2" else 60)
    return 1

number = 3
"""


def reward_of(folder: Path, name: str, seconds: float = 10.0) -> Reward:
    file = folder / "rewards.py"
    file.write_text(FUNCTIONS)
    return Reward(ObjectiveConfig(name="grpo", reward=f"{file}:{name}", reward_seconds=seconds))


def test_each_answer_gets_its_reward(tmp_path: Path):
    reward = reward_of(tmp_path, "is_right")
    assert reward(ANSWERS) == [1.0, 0.0]
    assert reward([]) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "raised ValueError: invalid literal for int() with base 10: 'five' for the answer 'five' to '1+2='"),
        ("leaves", "raised SystemExit for the answer '2' to '1+1='; mend it"),
        ("is_nan", "returned 'nan' for the answer '2' to '1+1='; it must return a finite number"),
        ("is_text", """returned "'five'" for the answer 'five'"""),
        ("hangs", "has not returned within objective.reward_seconds = 0.3 for the answer 'five' to '1+2='"),
        ("nothing", "has no function nothing; name one of it"),
        ("number", "has no function number; name one of it"),
    ],
)
def test_one_that_does_not_work_is_said_in_one_line(name: str, words: str, tmp_path: Path):
    begun = time.monotonic()
    with pytest.raises(InputError) as raised:
        reward_of(tmp_path, name, 0.3 if name == "hangs" else 10.0)(ANSWERS)
    assert time.monotonic() - begun < 9
    text = str(raised.value)
    assert text.startswith(f"objective.reward = {tmp_path}/rewards.py:{name}")
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "def f(:", "raise SystemExit(3)"])
def test_a_file_that_cannot_be_imported_is_said_in_one_line(text: str, tmp_path: Path):
    file = tmp_path / "rewards.py"
    for problem in ("there is no file", "importing it raised"):
        with pytest.raises(InputError, match=problem) as raised:
            Reward(ObjectiveConfig(name="grpo", reward=f"{file}:f"))
        assert "\n" not in str(raised.value)
        file.write_text(text)


@pytest.mark.parametrize(
    ("trained", "prompt", "reference", "rest"),
    [
        ([0, 0, 1, 1], [1, 2, 3], [4, 5], []),
        ([1, 1, 1, 1], [1], [2, 3, 4, 5], []),
        # Two answers of a conversation, and what follows the last.
        ([0, 1, 0, 1], [1, 2, 3, 4], [5], []),
        ([0, 1, 1, 0], [1, 2], [3, 4], [5]),
    ],
)
def test_the_prompt_of_a_row_is_all_before_its_last_answer(
    trained: list[int], prompt: list, reference: list, rest: list
):
    inputs, targets = np.arange(1, 5), np.arange(2, 6)
    assert prompt_of(inputs, targets, np.array(trained, np.float32)) == Prompt(prompt, reference, rest)
    assert prompt_of(inputs, targets, np.zeros(4)) is None


def test_a_scored_answer_stands_in_the_document_of_the_corpus():
    # 9 ends an answer, and the template writes 8 behind it.
    prompt = Prompt([1, 2], [3, 4, 9], [8])
    assert as_in_corpus(prompt, prompt.reference, {9}) == [1, 2, 3, 4, 9]
    assert as_in_corpus(prompt, [5, 9], {9}) == as_in_corpus(prompt, [5], {9}) == [1, 2, 5, 9]
    # Of a text the end is a target alone.
    assert as_in_corpus(Prompt([1, 2], [3, 9], []), [5, 6, 9], {9}) == [1, 2, 5, 6]


def test_an_answer_ends_before_its_mark_and_a_prompt_shows_those_within():
    tokenizer: Any = TextTokenizer()
    ids = tokenizer.encode("hello").tolist()
    assert answer_text(tokenizer, [*ids, 0, *ids], {0}) == answer_text(tokenizer, ids, {0}) == "hello"
    assert prompt_text(tokenizer, [257, *ids, 0, *ids]) == "hello<end>hello"
    assert prompt_text(tokenizer, ids) == "hello"
