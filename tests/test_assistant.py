"""The example of an assistant: its data, its reward, and the commands of its stages."""

import json
import runpy
import shlex
from pathlib import Path

import pytest

from launch.commands import parse
from launch.presets import load_config
from tests.launch.small_run import ROOT
from train.config.config import Config

EXAMPLE = ROOT / "examples" / "assistant"
DATA = runpy.run_path(str(EXAMPLE / "make_data.py"))
FILES = ("conversations", "preferences", "prompts", "held_out", "held_out_pairs")
right_sum = runpy.run_path(str(EXAMPLE / "rewards.py"))["right_sum"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data."""
    folder: Path = tmp_path_factory.mktemp("assistant")
    DATA["main"](folder)
    return folder


def lines_of(folder: Path, name: str) -> list[dict]:
    """The objects of a file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def sums_of(line: dict) -> set[tuple[int, int]]:
    """The sums that a line asks for."""
    turns = [turn for value in line.values() if isinstance(value, list) for turn in value if turn["role"] == "user"]
    numbers = [[int(word.strip("?.")) for word in turn["content"].split() if word[0].isdigit()] for turn in turns]
    assert all(len(pair) == 2 for pair in numbers), line
    return {(max(pair), min(pair)) for pair in numbers}


def test_no_held_out_sum_is_in_a_file_that_is_trained_on(folder: Path):
    by_file = {name: {s for line in lines_of(folder, name) for s in sums_of(line)} for name in FILES}
    assert by_file["held_out"] == by_file["held_out_pairs"]
    assert len(by_file["held_out"]) == DATA["HELD_OUT"] == 200
    for name in ("conversations", "preferences", "prompts"):
        assert len(by_file[name]) > 600
        assert not by_file[name] & by_file["held_out"]


def test_the_data_is_the_same_each_time_and_holds_what_it_says(folder: Path, tmp_path: Path):
    DATA["main"](tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()
    for line in lines_of(folder, "prompts"):
        assert json.loads(line["messages"][1]["content"]) == {"answer": sum(*sums_of(line))}
    assert all(line["sum"] == sum(*sums_of(line)) for line in lines_of(folder, "held_out"))
    for line in lines_of(folder, "preferences"):
        chosen, rejected = (line[name][-1]["content"] for name in ("chosen", "rejected"))
        assert line["chosen"][:-1] == line["rejected"][:-1]
        # Only the form differs, so that preferences teach nothing of sums.
        assert rejected == f"The answer is {json.loads(chosen)['answer']}."


def test_demonstrations_err_where_digits_carry_and_nowhere_else(folder: Path):
    differences: dict[bool, list[int]] = {True: [], False: []}
    as_json = []
    for line in lines_of(folder, "conversations"):
        turns = [turn["content"] for turn in line["messages"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            [(a, b)] = sums_of({"turns": [{"role": "user", "content": question}]})
            as_json.append(answer.startswith("{"))
            number = json.loads(answer)["answer"] if as_json[-1] else int(answer.removesuffix(".").split()[-1])
            differences[a % 10 + b >= 10].append(a + b - number)
    assert set(differences[False]) == {0}
    assert set(differences[True]) == {0, 10}
    assert sum(differences[True]) / len(differences[True]) == pytest.approx(10 * DATA["FORGOTTEN_SHARE"], abs=0.2)
    assert sum(as_json) / len(as_json) == pytest.approx(DATA["JSON_SHARE"], abs=0.02)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ('{"answer": 35}', 1.0),
        ('{"answer": 25}', 0.0),
        ('{"answer": "35"}', 0.0),
        ('{"sum": 35}', 0.0),
        ("The answer is 35.", 0.0),
        ("35", 0.0),
        ('{"answer": 35', 0.0),
        ('{"answer": 35}}', 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_is_for_the_right_number_as_json_alone(answer: str, reward: float):
    assert right_sum("What is 27 + 8?", answer, '{"answer": 35}') == reward


def stages() -> list[Config]:
    """The settings of the commands of run.sh, without the base's."""
    text = (EXAMPLE / "run.sh").read_text().replace("\\\n", " ")
    text = (
        text.replace("$config", "examples/assistant/assistant.py").replace("$to", "runs/x").replace("$base", "runs/y")
    )
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("ziggurat ")]
    arguments = [parse(words)[1] for words in commands]
    return [load_config(of.config, of.overrides) for of in arguments[1:]]


def test_each_stage_begins_with_the_last_weights_of_the_one_before(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    made = stages()
    assert [config.objective.name for config in made] == ["next_token", "dpo", "grpo"]
    before = ["runs/y@900", *(f"{config.train.run_dir}@{config.train.num_steps}" for config in made)]
    assert [config.train.init_from for config in made] == before[:-1]
    assert load_config("tiny", {}).train.num_steps == 900
    for config in made:
        assert config.train.init_with == "weights"
        assert config.model == load_config("tiny", {}).model
        assert Path(config.data.chat_template or "").is_file()
    assert made[-1].objective.reward == "examples/assistant/rewards.py:right_sum"
