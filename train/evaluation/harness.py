"""Tasks of EleutherAI's lm-evaluation-harness, and our model as one that it asks (`pip install 'ziggurat[tasks]'`).

The harness makes requests of a task's documents and scores what comes back. Every process of a run makes the same
requests in the same order, so that all run the same programs on the run's mesh.
"""

import contextlib
import dataclasses
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from data.errors import InputError
from data.tokenizer.tokenizer import Tokenizer
from model.context_parallel import to_zigzag
from model.decoder import Decoder
from model.generation.sampling import Sampling
from model.loss import predictions
from train.config.config import ResolvedConfig
from train.config.reading import nearest
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options
from train.evaluation.continuation import continuations, make_generator
from train.evaluation.held_out import Batch, put_on_devices, stack_rows
from train.evaluation.results import TaskResult

log = logging.getLogger("ziggurat")
# Positions of the shortest rows.
SHORTEST = 16
# New tokens where a task does not say how many, as in the harness's own adapters.
NEW_TOKENS = 256
# What a task may say of generation. The sampled tokens are those of seed 0.
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}
# Of the standard error where there is no formula for it.
RESAMPLES = 1000


class Tasks:
    """Tasks with their documents, to be evaluated on again and again.

    Args:
        names: of tasks, groups or tags.
        folder: with their YAML files; none: those of the harness, whose documents come from the Hugging Face Hub.
        limit: documents of each that count, at most.
        num_fewshot: examples before each document, where a task does not forbid them; none: as the task says.
        asked: where the names stand, as in `--tasks`.

    Raises:
        InputError: there is no such task, or its file or data are wrong.
    """

    def __init__(
        self, names: Sequence[str], folder: str | None, limit: int | None, num_fewshot: int | None, asked: str
    ):
        self.limit = limit
        where = Path(folder).expanduser() if folder is not None else None
        if where is not None and not where.is_dir():
            raise InputError(f"{asked}: there is no folder {where} with tasks")
        with quiet():
            manager = TaskManager(include_path=where, include_defaults=where is None)
        if missing := [name for name in names if name not in manager.all_tasks]:
            raise InputError("\n".join(no_such_task(asked, name, where, manager.all_tasks) for name in missing))
        self._loaded: Any = {"tasks": {}, "groups": {}}
        for name in names:
            # What can be wrong with a file, a template or a download the harness raises as it comes.
            try:
                with quiet():
                    loaded = manager.load([name])
                    for task in loaded["tasks"].values():
                        prepare(task, num_fewshot)
            except Exception as error:
                raise InputError(f"{asked}: the task {name} cannot be used: {told(error)}") from None
            for kind in self._loaded:
                self._loaded[kind] |= loaded[kind]

    def of_model(
        self,
        config: ResolvedConfig,
        tokenizer: Tokenizer,
        alive: Callable[[], None] = lambda: None,
        errors: bool = False,
    ) -> Callable[[Any], list[TaskResult]]:
        """The function that evaluates a model's weights, under the ambient mesh.

        Args:
            config: resolved; its batch size and segment length are the largest batch's.
            tokenizer: of the model.
            alive: is called after each piece of work.
            errors: whether standard errors are wanted, too.
        """
        model = Model(config, tokenizer, alive)

        def evaluate(weights: Any) -> list[TaskResult]:
            model.weights = weights
            with quiet():
                found = evaluator.evaluate(
                    model, self._loaded, limit=self.limit, bootstrap_iters=errors * RESAMPLES, log_samples=False
                )
            model.weights = None
            return [
                TaskResult(task, metric.removesuffix(",none"), float(value), number(values.get(error_of(metric))))
                for task, values in (found["results"] | found.get("groups", {})).items()
                for metric, value in values.items()
                if "," in metric and "_stderr," not in metric and number(value) is not None
            ]

        return evaluate


def no_such_task(asked: str, name: str, folder: Path | None, known: Sequence[str]) -> str:
    """What to say of a task that is not there."""
    if folder is None:
        return f"{asked}: lm-evaluation-harness has no task {name}{nearest(name, list(known))}"
    there = f"there are {', '.join(known)}" if known else "there is none"
    damaged = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # as above
            damaged.append(f"\n  {file} cannot be read: {told(error)}")
    return f"{asked}: {folder} has no task {name}; {there}{''.join(damaged)}"


def told(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def prepare(task: Any, num_fewshot: int | None) -> None:
    """Make a task ready, and try the request of its first document. ValueError where it is not for us."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError("it runs code that the model writes")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError("it is not of text alone")
    own = task.get_config("num_fewshot")
    # A task that says 0 means it.
    task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=1, rank=0, world_size=1)


def error_of(metric: str) -> str:
    """Where the harness has the standard error of its `metric,filter`."""
    name, _, rest = metric.partition(",")
    return f"{name}_stderr,{rest}"


def number(value: Any) -> float | None:
    """A result that is a number."""
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Here the harness draws no bars, says nothing, starts no processes, and leaves the global random numbers alone."""
    kept, log_of_harness = (random.getstate(), np.random.get_state()), logging.getLogger("lm_eval")
    level = log_of_harness.level
    log_of_harness.setLevel(logging.ERROR)
    random.seed(0)
    np.random.seed(1234)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log_of_harness.setLevel(level)
        random.setstate(kept[0])
        np.random.set_state(kept[1])


# (weights, batch) → of each row log p of its targets in nats, and whether all of them are the likeliest.
ScoringStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_scoring_step(config: ResolvedConfig) -> ScoringStep:
    """The compiled function; a row's targets are where `loss_weights` is not zero. Every process gets the results."""
    # A kernel that a run asks for may not take short rows.
    model, layout = dataclasses.replace(config.model, attention_kernel="auto"), training_layout(config.mesh)

    def scoring_step(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = {name: to_zigzag(x, layout) for name, x in batch.items()}
        decoder = Decoder(model, weights, layout)
        x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
        log_p, is_first = predictions(x_BTD, decoder.unembedding_matrix(), batch["targets"], model, layout)
        counts = batch["loss_weights"] > 0
        scores, greedy = jnp.sum(jnp.where(counts, log_p, 0.0), axis=1), jnp.all(is_first | ~counts, axis=1)
        return layout.reshard(scores, None), layout.reshard(greedy, None)

    return jax.jit(scoring_step, compiler_options=compiler_options())


class Model(LM):
    """A model as the harness asks it; arguments as of `Tasks.of_model`.

    Attributes:
        weights: nested, on the ambient mesh; none until they are given.
    """

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer, alive: Callable[[], None]):
        super().__init__()
        self.config, self.tokenizer, self.alive = config, tokenizer, alive
        self.weights: Any = None
        self._step = make_scoring_step(config)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log p of the continuation in nats, and whether greedy decoding gives it."""
        return self.scores([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each whole text in nats, after what stands before a text."""
        pairs = [self.pair("", text) for (text,) in (request.args for request in requests)]
        return [score for score, _ in self.scores(pairs)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations of the contexts, each up to the first of its stop strings, the end of text or its length."""
        # Those of the same settings are continued together.
        alike, found = dict[str, list[int]](), [""] * len(requests)
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for numbers in alike.values():
            texts = self.continued([requests[i].args[0] for i in numbers], requests[numbers[0]].args[1])
            for i, text in zip(numbers, texts, strict=True):
                found[i] = text
        return found

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both as the harness's own adapters cut them.

        Spaces at the context's end go with the continuation, and the tokens of both together are cut where those of the
        context alone end. Where a token reaches over the border, at least the last one is the continuation's. Of
        no text at all nothing is.
        """
        tokens = self.tokenizer.encode_with_bos(context + continuation)
        cut = max(min(len(self.tokenizer.encode_with_bos(context.rstrip())), len(tokens) - 1), 1)
        return tokens[:cut], tokens[cut:]

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each pair of token lists: log p of the second after the first, and whether it is greedy decoding's."""
        T = self.config.data.segment_length
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(self.config.mesh))
        rows = self.config.train.batch_size // self.config.train.accumulation_steps
        lengths, by_length = row_lengths(self.config), dict[int, list[tuple[int, list[int], int]]]()
        for i, pair in enumerate(pairs):
            for tokens, count in pieces(*pair, T):
                length = next(length for length in lengths if length >= len(tokens) - 1)
                by_length.setdefault(length, []).append((i, tokens, count))
        found = [(0.0, True)] * len(pairs)
        for length, of_length in sorted(by_length.items()):
            answers: list[tuple[float, bool]] = []
            for batch in stack_rows(
                (row(tokens, count, length) for _, tokens, count in of_length), rows * (T // length)
            ):
                score_B, greedy_B = self._step(self.weights, put_on_devices(batch, sharding))
                answers += zip(np.asarray(score_B).tolist(), np.asarray(greedy_B).tolist(), strict=True)
                self.alive()
            for (i, _, _), (score, greedy) in zip(of_length, answers, strict=False):
                found[i] = found[i][0] + score, found[i][1] and greedy
        return found

    def continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Their continuations, as `generate_until` says."""
        given = normalize_gen_kwargs(settings, NEW_TOKENS)
        for name in sorted(given.keys() - GENERATION_SETTINGS):
            log.warning("generation_kwargs: %s has no effect", name)
        T, most = self.config.data.segment_length, given["max_gen_toks"]
        # All is seen at once where it can be.
        seen = T - most if most < T else T // 2
        texts = [""] * len(contexts)
        for part in continuations(
            make_generator(self.config, self.weights, self.tokenizer),
            self.tokenizer,
            [self.tokenizer.encode_with_bos(context)[-seen:] for context in contexts],
            max_new_tokens=most,
            sampling=Sampling(temperature=given.get("temperature", 0.0), top_k=given.get("top_k", 0)),
            stop=[stop for stop in given["until"] if stop],
            batch_size=self.config.train.batch_size // self.config.train.accumulation_steps,
        ):
            texts[part.number] += part.text
            self.alive()
        return texts


def row_lengths(config: ResolvedConfig) -> list[int]:
    """The lengths of rows that are computed with, ascending: a segment, and halves of it that the mesh can share."""
    layout, T = training_layout(config.mesh), config.data.segment_length
    time = layout.size("time")
    unit = math.lcm(layout.size("sequence"), 2 * time if time > 1 else 1)
    lengths = [T]
    while lengths[0] % (2 * unit) == 0 and lengths[0] // 2 >= SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    return lengths


def pieces(context: list[int], continuation: list[int], T: int) -> Iterator[tuple[list[int], int]]:
    """What a model of T positions reads to score a continuation: (tokens, how many of the last count).

    Each token of the continuation counts once, after the newest of what stands before it: of a longer text a piece has
    T tokens and one before them, and the last as many before its own as there is room for. Of a whole text these are
    the harness's disjoint windows.
    """
    for start in range(0, len(continuation), T):
        part = continuation[start : start + T]
        before = (context + continuation[:start])[-(T + 1 - len(part)) :]
        yield before + part, len(part)


def row(tokens: Sequence[int], count: int, length: int) -> dict[str, np.ndarray]:
    """A row of a batch that reads all tokens but the last, filled up to `length`; the last `count` are its targets."""
    n = len(tokens) - 1
    filled = np.zeros(length + 1, np.int32)
    filled[: n + 1] = tokens
    place = np.arange(length, dtype=np.int32)
    return {
        "tokens": np.where(place < n, filled[:-1], 0),
        "targets": filled[1:],
        "positions": place,
        "segment_ids": (place < n).astype(np.int32),
        "loss_weights": ((n - count <= place) & (place < n)).astype(np.float32),
    }
