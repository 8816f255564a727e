"""A step's prompts, the answers that the model samples to them, and the batch of those by which it is trained.

With the rewards r of a group, the answers to one prompt, an answer's advantage is A = (r − mean(r)) / (std(r) + 1e-4)
(GRPO: Shao et al. 2024, arXiv:2402.03300, section 4.1.2). `train.step.objective` has the loss.

The answers follow from the weights, the prompts, the run's seed and the step alone: each has a random key of its own,
which does not depend on the other rows, so a resumed run samples the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.conversations import open_template, tokens_that_end
from data.corpus import stable_hash
from data.errors import InputError
from data.loader import LoadedBatch
from data.tokenizer.tokenizer import Tokenizer
from model.generation.generator import Generator
from model.generation.sampling import GREEDY, Sampling
from train.config.config import ResolvedConfig
from train.devices.collectives import all_gather_json
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.evaluation.continuation import make_generator
from train.evaluation.held_out import Batch, pairs_of, put_on_devices
from train.rollout.prompt import Prompt, answer_text, as_in_corpus, prompt_of, prompt_text
from train.rollout.reward import Answer, Reward
from train.rollout.reward_model import RewardModel
from train.run.folder import HeldOutDocument
from train.run.step_log import StepLog

# Added to a group's deviation.
EPSILON = 1e-4
READ = ("tokens", "targets", "loss_weights", "segment_ids")


class Rollout(NamedTuple):
    """The sampled answers of a step.

    Attributes:
        batch: arrays [B, T] as the step takes them, with the advantage of each answer's tokens. Rows of a prompt are
            neighbours.
        figures: numbers for the step's line of metrics.jsonl.
        samples: the answers to the first prompt with their rewards, a line of samples.jsonl.
        teaches: false if no answer of any group was better than another.
    """

    batch: Batch
    figures: dict[str, Any]
    samples: list[dict[str, Any]]
    teaches: bool


class Rollouts:
    """Samples answers of a run's model, and gives them their rewards. All processes call each method together.

    Args:
        tokenizer: the run's, which has its chat template if it has conversations.
        alive: is called after what takes long.
    """

    def __init__(
        self, config: ResolvedConfig, tokenizer: Tokenizer, reward: Reward | RewardModel, alive: Callable[[], None]
    ):
        self._config, self._tokenizer, self._reward, self._alive = config, tokenizer, reward, alive
        template = open_template(config.data, tokenizer) if config.data.converses else None
        self._end_ids = tokens_that_end(template, tokenizer) if template else []
        self._ends = {*tokenizer.stop_ids, *self._end_ids}

    def __call__(self, step: int, weights: Any, read: Mapping[str, jax.Array]) -> Rollout:
        """Returns the batch of a step (from 1) from the rows [P, T] that it has read, of one prompt each."""
        c = self._config
        rows = {name: np.asarray(multihost_utils.process_allgather(read[name], tiled=True)) for name in READ}
        # A row has one document, and then padding.
        pairs = ([x[ids > 0] for x in arrays] for *arrays, ids in zip(*rows.values(), strict=True))
        found = [prompt_of(*arrays) for arrays in pairs]
        groups = [prompt for prompt in found if prompt is not None]
        prompts = [prompt for prompt in groups for _ in range(c.objective.group_size)]
        seed = stable_hash("answers", c.train.seed, step) % 2**31
        answers = self._answer(weights, prompts, Sampling(), seed)
        rewards_PG = self._rewards(prompts, answers).reshape(len(groups), -1)
        mean_P1, std_P1 = rewards_PG.mean(1, keepdims=True), rewards_PG.std(1, ddof=1, keepdims=True)
        advantages_PG = (rewards_PG - mean_P1) / (std_P1 + EPSILON)
        lengths = [len(answer) for answer in answers]
        figures = {
            "reward": rewards_PG.mean(), "reward_deviation": std_P1.mean(), "equal_groups": np.mean(std_P1 == 0),
            "answer_length": np.mean(lengths), "ended": np.mean([answer[-1] in self._ends for answer in answers]),
            "answer_tokens": np.float64(sum(lengths)),
        }  # fmt: skip
        batch = self._batch(prompts, answers, advantages_PG.reshape(-1))
        shown = range(c.objective.group_size) if groups else ()
        samples = [
            self._described(prompts[i], answers[i])._asdict()
            | {"reward": rewards_PG[0, i], "advantage": advantages_PG[0, i]}
            for i in shown
        ]
        return Rollout(batch, figures, samples, bool(np.any(std_P1)))

    def answered(
        self, step: int, state: Mapping[str, Any], loaded: LoadedBatch, log: StepLog | None
    ) -> tuple[LoadedBatch, bool]:
        """Returns a step's batch of answers, and True if an update with it would be momentum alone; logs samples."""
        rollout = self(step, state["weights"], loaded.batch)
        if log:
            log.write({"step": step, "samples": rollout.samples})
        loaded = loaded._replace(batch=dict(rollout.batch), figures=rollout.figures)
        return loaded, not rollout.teaches and "reference" not in state

    def evaluate(self, weights: Any, documents: Sequence[HeldOutDocument]) -> dict[str, float]:
        """Returns the mean reward of the most likely answers to held-out prompts, and their length in tokens."""
        made = [pairs_of(self._tokenizer, document) for document in documents]
        fit = [pairs for pairs in made if pairs.length <= self._config.data.segment_length]
        found = [prompt_of(pairs.inputs, pairs.targets, pairs.trained) for pairs in fit]
        prompts = [prompt for prompt in found if prompt is not None]
        if not prompts:
            return {}
        answers = self._answer(weights, prompts, GREEDY, 0)
        rewards = self._rewards(prompts, answers)
        return {"reward": float(rewards.mean()), "answer_length": float(np.mean([len(answer) for answer in answers]))}

    def try_reward(self, documents: Sequence[HeldOutDocument]) -> None:
        """Gives a function one answer of the corpus, to see that it works. InputError as `Reward` raises."""
        if isinstance(self._reward, RewardModel):
            return
        for pairs in (pairs_of(self._tokenizer, document) for document in documents[:1]):
            if prompt := prompt_of(pairs.inputs, pairs.targets, pairs.trained):
                self._rewards([prompt], [prompt.reference])

    def _answer(self, weights: Any, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[list[int]]:
        """Returns the tokens of each answer, at least one, with the one that ends it if it was drawn."""
        c = self._config
        generator: Generator = make_generator(c, weights, self._tokenizer, end_ids=self._end_ids)
        answers: list[list[int]] = [[] for _ in prompts]
        deltas = generator(
            [prompt.tokens for prompt in prompts], max_new_tokens=c.objective.max_new_tokens, sampling=sampling,
            seed=seed, batch_size=max(c.train.batch_size // c.train.accumulation_steps, 1),
        )  # fmt: skip
        for delta in deltas:
            answers[delta.prompt_index] += delta.tokens if delta.end_id is None else [*delta.tokens, delta.end_id]
            self._alive()
        # A row has room for as many pairs of input and target as a segment.
        rooms = (c.data.segment_length - len(prompt.tokens) + 1 for prompt in prompts)
        return [answer[:room] for answer, room in zip(answers, rooms, strict=True)]

    def _rewards(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> np.ndarray:
        """Returns the reward of each answer, float64; every process calls a function for a part of them."""
        if isinstance(self._reward, RewardModel):
            pairs = zip(prompts, answers, strict=True)
            return self._reward([as_in_corpus(prompt, answer, self._ends) for prompt, answer in pairs])
        index, count = jax.process_index(), jax.process_count()
        mine = range(index, len(prompts), count)
        problem, rewards = None, []
        try:
            rewards = self._reward([self._described(prompts[i], answers[i]) for i in mine])
        except InputError as error:
            problem = str(error)
        everyones = all_gather_json({"problem": problem, "rewards": rewards})
        self._alive()
        if problems := [of["problem"] for of in everyones if of["problem"]]:
            raise InputError(problems[0])
        return np.array([everyones[i % count]["rewards"][i // count] for i in range(len(prompts))])

    def _described(self, prompt: Prompt, answer: Sequence[int]) -> Answer:
        texts = (answer_text(self._tokenizer, tokens, self._ends) for tokens in (answer, prompt.reference))
        return Answer(prompt_text(self._tokenizer, prompt.tokens), *texts)

    def _batch(self, prompts: Sequence[Prompt], answers: Sequence[list[int]], advantages: np.ndarray) -> Batch:
        """Returns the batch of the answers; rows without a prompt are empty."""
        c = self._config
        shape = (c.train.batch_size, c.data.segment_length)
        rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
        rows |= {name: np.zeros(shape, np.float32) for name in ("loss_weights", "advantages")}
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = np.array([*prompt.tokens, *answer], np.int32)
            n, answered = len(ids) - 1, slice(len(prompt.tokens) - 1, len(ids) - 1)
            rows["tokens"][row, :n], rows["targets"][row, :n] = ids[:-1], ids[1:]
            rows["positions"][row, :n], rows["segment_ids"][row, :n] = np.arange(n), 1
            rows["loss_weights"][row, answered] = 1 / len(answer) if c.objective.length_normalized else 1
            rows["advantages"][row, answered] = advantages[row]
        return put_on_devices(rows, batch_sharding(jax.sharding.get_mesh(), training_layout(c.mesh)))
