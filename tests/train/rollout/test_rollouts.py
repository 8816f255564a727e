"""The batch of a step's own answers: groups, advantages, and random keys of the step and the answer alone."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data.segmenter import SegmentPart, make_pairs, make_segment
from tests.data.stand_in import TextTokenizer as Bytes
from tests.small import small_model, small_weights
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import one_device_mesh
from train.rollout.reward import Reward
from train.rollout.rollouts import Rollout, Rollouts

T, GROUP = 32, 4
TEXTS = [("one and", " two"), ("three?", "4"), ("", "five")]


def config_for(folder: Path, body: str, **objective: Any) -> Config:
    file = folder / "rewards.py"
    file.write_text(f"def reward(prompt, answer, reference):\n    return {body}\n")
    given = {"name": "grpo", "reward": f"{file}:reward", "group_size": GROUP, "max_new_tokens": 6, **objective}
    values = {"objective": given, "data": {"segment_length": T, "segmentation": "document"}}
    values |= {"train": {"batch_size": 16, "init_from": "a@1"}}
    return dataclasses.replace(make_config(values), model=small_model(vocab_size=258)).resolved()


@functools.cache
def weights() -> Any:
    return small_weights(small_model(vocab_size=258))


def read(texts: list[tuple[str, str]]) -> dict[str, jax.Array]:
    """The rows of some documents, and an empty row."""
    config = dataclasses.replace(make_config({}).data, segment_length=T, segmentation="document")
    rows = []
    for prompt, text in texts:
        ids = Bytes().encode(prompt + text)
        pairs = make_pairs(ids, Bytes.bos_ids, Bytes.eos_id, prompt_length=len(prompt))
        rows.append(make_segment([SegmentPart(pairs, 0, pairs.length)], config))
    rows.append(make_segment([], config))
    return {name: jax.numpy.stack([row[name] for row in rows]) for name in rows[0]}


def rollout(config: Config, step: int = 1, texts: list[tuple[str, str]] = TEXTS) -> Rollout:
    tokenizer: Any = Bytes()
    with jax.set_mesh(one_device_mesh()):
        return Rollouts(config, tokenizer, Reward(config.objective), lambda: None)(step, weights(), read(texts))


def answers(found: Rollout) -> list[bytes]:
    """The sampled bytes of each row, ends as \\xff."""
    batch = {name: np.asarray(x) for name, x in found.batch.items()}
    rows = zip(batch["targets"], batch["loss_weights"], strict=True)
    return [bytes((x - 1) % 256 for x in targets[weights > 0]) for targets, weights in rows]


def test_the_rows_are_groups_of_answers_with_their_advantages(tmp_path: Path):
    found = rollout(config_for(tmp_path, "sum(map(ord, answer)) % 7"))
    batch = {name: np.asarray(x) for name, x in found.batch.items()}
    assert {x.shape for x in batch.values()} == {(16, T)}
    for row, (prompt, reference) in enumerate(text for text in TEXTS for _ in range(GROUP)):
        n = int((batch["segment_ids"][row] > 0).sum())
        ids = [257, *Bytes().encode(prompt).tolist()]
        assert batch["tokens"][row, : len(ids)].tolist() == ids
        np.testing.assert_array_equal(batch["tokens"][row, 1:n], batch["targets"][row, : n - 1])
        assert batch["positions"][row, :n].tolist() == [*range(n)]
        expected = np.zeros(T)
        expected[len(ids) - 1 : n] = 1
        np.testing.assert_array_equal(batch["loss_weights"][row], expected)
        assert 1 <= n - len(ids) + 1 <= 6
        assert reference not in answers(found)[row].decode(errors="replace")
    # Rows without a prompt are empty.
    assert not any(x[12:].any() for x in batch.values())
    texts = [answer.split(b"\xff")[0].decode(errors="replace") for answer in answers(found)[:12]]
    rewards = np.array([sum(map(ord, text)) % 7 for text in texts], float).reshape(3, GROUP)
    advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(batch["advantages"].max(1)[:12] + batch["advantages"].min(1)[:12],
                               advantages.reshape(-1), rtol=1e-5, atol=1e-6)  # fmt: skip
    assert found.figures["reward"] == pytest.approx(rewards.mean())
    assert found.figures["answer_tokens"] == batch["loss_weights"].sum()
    assert found.figures["ended"] == np.mean([b"\xff" in answer for answer in answers(found)[:12]])
    assert [sample["text"] for sample in found.samples] == texts[:GROUP]
    assert {(sample["prompt"], sample["reference"]) for sample in found.samples} == {TEXTS[0]}
    assert found.teaches


def test_other_steps_sample_other_answers_and_rows_do_not_matter(tmp_path: Path):
    config = config_for(tmp_path, "1.0", length_normalized=True)
    first = rollout(config)
    assert answers(first) == answers(rollout(config))
    assert answers(first) != answers(rollout(config, step=2))
    assert len({*answers(first)[:GROUP]}) > 1
    # The answers to the first prompt are those without the others.
    assert answers(first)[:GROUP] == answers(rollout(config, texts=TEXTS[:1]))[:GROUP]
    assert not first.teaches
    assert not np.asarray(first.batch["advantages"]).any()
    # Each answer has the same weight.
    np.testing.assert_allclose(np.asarray(first.batch["loss_weights"]).sum(1), [1.0] * 12 + [0.0] * 4, rtol=1e-6)
