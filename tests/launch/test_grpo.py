"""A run on its own answers: what it learns, that it resumes exactly, what it shows and refuses (C1, C4, C6, C9)."""

import dataclasses
import json
import random
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from data.tokenizer.folder import load_tokenizer
from launch.presets import load_config
from tests.launch.small_chats import EXAMPLE, flags_of
from tests.launch.small_run import back_to, command, here, metrics, write_config, ziggurat
from tests.launch.test_preferences import write_pairs
from tests.launch.test_pretrain import assert_same_end, state_of, without_times
from tests.launch.test_reward import FLAGS as REWARD_FLAGS
from tests.launch.test_reward import FORK
from train.config.run_config import MeshConfig
from train.devices.mesh import one_device_mesh
from train.evaluation.preferences import pair_of
from train.rollout.reward_model import RewardModel
from train.run.folder import Run

STEPS = 6
REWARDS = """
def letters(prompt, answer, reference):
    return sum(map(answer.count, "eat"))

def raises_later(prompt, answer, reference):
    return 1 if answer == reference else 1 / 0

def hangs(prompt, answer, reference):
    while True:
        pass
"""
FLAGS = [
    "--config.data.segmentation=document", "--config.data.prompt_field=ask", "--config.data.text_field=answer",
    "--config.objective.name=grpo", "--config.objective.group_size=2", "--config.objective.max_new_tokens=6",
    "--config.objective.updates=2", "--config.train.init_with=weights", "--config.train.batch_size=16",
    f"--config.train.num_steps={STEPS}", "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=3",
    "--config.checkpoint.export=false", "--config.evaluation.sample_tokens=0", "--config.evaluation.every_steps=3",
    "--config.optimizer.learning_rate=5e-3",
]  # fmt: skip


def flags_for(folder: Path, parent: Path, reward: str = "letters", run: str = "run") -> list[str]:
    prompts, rewards = folder / "prompts.jsonl", folder / "rewards.py"
    if not prompts.exists():
        animals = ["cat", "dog", "bird", "fish"]
        records = [{"ask": f"who is {animals[i % 4]} {i}?", "answer": f"my {animals[i % 4]}."} for i in range(200)]
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        rewards.write_text(REWARDS)
    given = {"data.corpus": prompts, "train.init_from": f"{parent}@12", "objective.reward": f"{rewards}:{reward}"}
    return [f"--config={write_config(folder, run)}", *(f"--config.{k}={v}" for k, v in given.items()), *FLAGS]


def samples(run: Path) -> list[dict]:
    """The records of samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rewarded(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("rewarded")
    assert here("pretrain", *flags_for(folder, finished)) == 0
    return folder / "run"


def test_it_learns_what_is_rewarded_and_logs_what_it_samples(rewarded: Path, finished: Path):
    records = metrics(rewarded)
    assert [record["step"] for record in records] == [record["step"] for record in samples(rewarded)]
    assert records[-1]["reward"] > 1.5 * records[0]["reward"] > 0
    evaluated = [record for record in records if "validation_reward" in record]
    assert [record["step"] for record in evaluated] == [1, 3, STEPS]
    assert evaluated[-1]["validation_reward"] > 1.3 * evaluated[0]["validation_reward"] > 0
    assert all(record["kl"] > 0 for record in records)
    for record, line in zip(records, samples(rewarded), strict=True):
        assert record["answer_tokens"] == record["loss_weight"] == 16 * record["answer_length"]
        assert record["utilization"] == record["answer_tokens"] / (16 * 32)
        assert 1 <= record["answer_length"] <= 6
        assert 0 <= record["clipped"] <= 1
        group = line["samples"]
        assert len(group) == 2
        assert len({sample["prompt"] for sample in group}) == 1
        for sample in group:
            assert re.fullmatch(r"who is \w+ \d+\?", sample["prompt"])
            assert re.fullmatch(r"my \w+\.", sample["reference"])
            assert sample["prompt"].split()[2] in sample["reference"]
            assert sample["reward"] == sum(map(sample["text"].count, "eat"))
        [first, second] = group
        assert (first["advantage"] > second["advantage"]) == (first["reward"] > second["reward"])
        assert first["advantage"] == pytest.approx(-second["advantage"])
    state, _ = state_of(rewarded, STEPS)
    begun, _ = state_of(finished, 12)
    jax.tree.map(np.testing.assert_array_equal, state["reference"], begun["weights"])


def test_it_resumes_exactly_with_the_same_answers(rewarded: Path, tmp_path: Path, capsys):
    again = back_to(2, rewarded, tmp_path / "again")
    reward = f"--config.objective.reward={rewarded.parent / 'rewards.py'}:letters"
    # A run's folder is data: what runs code is given again.
    assert here("pretrain", f"--config={again}") == 2
    assert "objective.name = grpo needs a reward" in capsys.readouterr().err
    assert here("pretrain", f"--config={again}", reward) == 0
    assert re.search(r"step 6/6  reward \d\.\d{4}  loss -?0\.\d{4}", capsys.readouterr().err)
    assert_same_end(again, rewarded, STEPS)
    assert without_times(metrics(again)) == without_times(metrics(rewarded))
    assert samples(again) == samples(rewarded)
    assert here("pretrain", f"--config={again}", reward, "--config.objective.group_size=4") == 2
    assert "objective.group_size" in capsys.readouterr().err


def test_killed_at_any_instant_it_ends_with_the_same_bits(rewarded: Path, finished: Path, tmp_path: Path):
    flags = flags_for(tmp_path, finished)
    process = command("pretrain", *flags, devices=8, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    last = random.randrange(3, STEPS)
    for line in process.stderr:
        if re.match(rf"step {last}/", line):
            break
    process.kill()
    process.wait()
    assert here("pretrain", *flags) == 0
    (state, _), (expected, _) = state_of(tmp_path / "run", STEPS), state_of(rewarded, STEPS)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert samples(tmp_path / "run") == samples(rewarded)


def test_two_processes_sample_and_learn_the_same(rewarded: Path, finished: Path, tmp_path: Path):
    flags = [*flags_for(tmp_path, finished), "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    done = ziggurat("launch", "local", "--processes=2", "--devices=2", "--", "pretrain", *flags)
    assert done.returncode == 0, done.stderr
    # A token whose probability is rounded otherwise may be another one, after some updates.
    assert samples(tmp_path / "run")[0] == samples(rewarded)[0]
    found, expected = metrics(tmp_path / "run")[0], metrics(rewarded)[0]
    for name in ("reward", "reward_deviation", "answer_tokens", "equal_groups", "ended"):
        assert found[name] == expected[name]
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_conversation_is_answered_up_to_the_mark_that_ends_a_turn(chatted: Path, tmp_path: Path):
    reward = tmp_path / "rewards.py"
    reward.write_text("def short(prompt, answer, reference):\n    return -len(answer)\n")
    changes = {"objective.name": "grpo", "objective.reward": f"{reward}:short", "objective.group_size": 2,
               "objective.max_new_tokens": 4, "objective.kl_weight": 0, "data.segmentation": "document",
               "train.init_from": f"{chatted}@6", "train.init_with": "weights", "train.batch_size": 16,
               "train.num_steps": 1, "train.run_dir": tmp_path / "answers", "data.on_bad_document": "skip",
               "data.segment_length": 128, "checkpoint.export": "false", "evaluation.sample_tokens": 0}  # fmt: skip
    chats = [f for f in flags_of(tmp_path) if f.startswith("--config=")]
    corpus = tmp_path / "only_chats.jsonl"
    turns = [{"role": "user", "content": "who is cat 7?"}, {"role": "assistant", "content": "my cat."}]
    corpus.write_text("".join(json.dumps({"messages": turns[:2] * (1 + i % 3)}) + "\n" for i in range(200)))
    changes |= {"data.corpus": corpus, "data.messages_field": "messages", "data.chat_template": EXAMPLE}
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    assert here("pretrain", *chats, *given) == 0
    [line] = samples(tmp_path / "answers")
    for sample in line["samples"]:
        assert sample["reference"] == "my cat."
        assert sample["prompt"].count("who is cat 7?") in (1, 2, 3)
        assert "<|" in sample["prompt"]


def test_a_report_and_a_plan_know_the_answers(rewarded: Path, tmp_path: Path, capsys):
    assert here("report", rewarded, f"--output={tmp_path / 'report.html'}") == 0
    page = (tmp_path / "report.html").read_text()
    for words in ("Held-out reward", "of sampled answers", "Equal rewards", "Entropy"):
        assert words in page
    # Nothing of it is executed, so a plan of a run's folder needs no reward.
    assert load_config(str(rewarded), {}).objective.reward is None
    capsys.readouterr()
    assert here("inspect", "data", rewarded, "--step=2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [len(row["parts"]) for row in rows] == [1] * 8
    first = samples(rewarded)[1]["samples"][0]
    assert first["prompt"] + first["reference"] == rows[0]["parts"][0]["text"]


def test_what_a_user_gets_wrong_is_said_before_anything_runs(finished: Path, tmp_path: Path, capsys):
    start = ["pretrain", *flags_for(tmp_path, finished)]
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"ask": "q" * (99 * (i == 4) + 1), "answer": "a"}) + "\n" for i in range(60)))
    rewards = tmp_path / "rewards.py"
    for flags, words in (
        (["--config.objective.reward=none"], ["needs a reward; give objective.reward=FILE.py:FUNCTION"]),
        (["--config.objective.reward=rewards"], ["rewards"]),
        ([f"--config.objective.reward={finished}"], ["predicts tokens and gives no scores; name a run with model.rew"]),
        ([f"--config.objective.reward={rewards}:other"], ["has no function other"]),
        ([f"--config.objective.reward={rewards}:raises_later"], ["raised ZeroDivisionError"]),
        ([f"--config.objective.reward={rewards}:hangs", "--config.objective.reward_seconds=0.5"],
         ["has not returned within objective.reward_seconds = 0.5"]),
        (["--config.objective.group_size=3", "--config.data.segmentation=pack", "--config.data.prompt_field=none",
          "--config.objective.max_new_tokens=32", "--config.model.residual_dropout=0.1", "--config.objective.beta=1"],
         ["objective.group_size = 3 does not divide train.batch_size = 16", "it must be document",
          "needs prompts; name their field", "leaves a row of data.segment_length = 32 no room for a prompt",
          "model: dropout cannot be used with objective.name = grpo", "objective.beta has no effect"]),
        (["--config.objective.name=next_token"], ["objective.reward has no effect with objective.name = next_token"]),
        (["--config.train.init_from=none", "--config.train.init_with=all"],
         ["objective.name = grpo compares with the weights that the run begins with"]),
        (["--config.data.num_streams=3"],
         ["does not divide train.batch_size = 16 / objective.group_size = 2; nearest that does: 2"]),
        ([f"--config.data.corpus={long}"], [f"{long}:5: the document takes", "and is never cut"]),
    ):  # fmt: skip
        capsys.readouterr()
        assert here(*start, *flags) == 2, flags
        err = capsys.readouterr().err
        for word in words:
            assert word in err, err
        assert "Traceback" not in err
        assert not [*(tmp_path / "run" / "checkpoints").glob("[0-9]*")]


def test_a_reward_model_rewards_as_it_scores_its_own_pairs(finished: Path, tmp_path: Path, capsys):
    """The fork of a fork: a reward model that likes animals, and a policy that it rewards."""
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    corpus = [f"--config.data.corpus={pairs}", f"--config.train.init_from={finished}@12"]
    liked = [*corpus, *REWARD_FLAGS, *FORK, "--config.checkpoint.export=false"]
    assert here("pretrain", f"--config={write_config(tmp_path, 'liked')}", *liked) == 0
    model = str(tmp_path / "liked")
    flags = [*flags_for(tmp_path, finished), f"--config.objective.reward={model}", "--config.train.num_steps=2"]
    assert here("pretrain", *flags) == 0
    assert metrics(tmp_path / "run")[0]["reward_deviation"] > 0
    # The accuracy of held-out pairs is that of its rewards.
    documents = [document for document in Run(tmp_path / "liked").held_out_texts() if document.rejected]
    tokenizer = load_tokenizer(tmp_path / "liked" / "tokenizer")
    config = dataclasses.replace(Run(tmp_path / "run").load_config(), mesh=MeshConfig())
    with jax.set_mesh(one_device_mesh()):
        reward = RewardModel(model, config.resolved(), tokenizer, lambda: None)
        inputs = [pair_of(tokenizer, document).sequences for document in documents]
        given = reward([answer.inputs.tolist() for pair in inputs for answer in pair]).reshape(-1, 2)
    last = metrics(tmp_path / "liked")[-1]
    assert np.mean(given[:, 0] > given[:, 1]) == pytest.approx(last["held_out_preference_accuracy"])
    assert np.mean(given[:, 0] - given[:, 1]) == pytest.approx(last["held_out_margin"], rel=1e-4)
    other = write_config(tmp_path, "other")
    assert here("pretrain", f"--config={other}", *liked, "--config.train.num_steps=1",
                "--config.train.init_from=none", "--config.train.init_with=all",
                "--config.tokenizer.vocab_size=400") == 0  # fmt: skip
    capsys.readouterr()
    again = [flag.replace(f"{tmp_path}/run.py", f"{write_config(tmp_path, 'third')}") for flag in flags]
    assert here("pretrain", *again, f"--config.objective.reward={tmp_path / 'other'}") == 2
    assert "has another tokenizer than the run" in capsys.readouterr().err
