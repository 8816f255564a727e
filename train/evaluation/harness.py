"""Tasks of EleutherAI's lm-evaluation-harness, and our model as one that it asks (`pip install 'ziggurat[tasks]'`).

The harness makes requests from a task's documents and scores the answers. Every process of a run makes the same
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
from model.generation.sampling import Sampling
from train.config.config import ResolvedConfig
from train.config.values import nearest
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.devices.xla import compiler_options
from train.evaluation.continuation import continuations, make_generator
from train.evaluation.held_out import Batch, predicted, put_on_devices, stack_rows
from train.evaluation.results import TaskResult

log = logging.getLogger("ziggurat")
# Smallest number of positions in a compiled row.
SHORTEST = 16
# Default number of new tokens of a task, as in the harness's own adapters.
NEW_TOKENS = 256
# Generation settings of a task that have an effect. Sampling uses seed 0.
GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}
# Bootstrap samples of a standard error without a formula.
RESAMPLES = 1000


class Tasks:
    """Tasks with their documents, for repeated evaluation. InputError if one does not exist, or has wrong data.

    Args:
        names: names of tasks, groups or tags.
        folder: folder of their YAML files; None for the harness's own, whose documents come from the Hugging Face Hub.
        limit: largest number of documents of each task.
        num_fewshot: examples before each document unless a task forbids them; None for the task's own number.
        asked: the flag or field that names the tasks, as in `--tasks`.
    """

    def __init__(
        self, names: Sequence[str], folder: str | None, limit: int | None, num_fewshot: int | None, asked: str
    ):
        self.limit = limit
        place = None if folder is None else Path(folder).expanduser()
        if place is not None and not place.is_dir():
            raise InputError(f"{asked}: there is no folder {place} with tasks")
        with silence_harness():
            manager = TaskManager(include_path=place, include_defaults=place is None)
        if missing := [name for name in names if name not in manager.all_tasks]:
            raise InputError("\n".join(no_such_task(asked, name, place, manager.all_tasks) for name in missing))
        self._loaded: Any = {"tasks": {}, "groups": {}}
        for name in names:
            # The harness raises any exception for faults of a file, a template or a download.
            try:
                with silence_harness():
                    loaded = manager.load([name])
                    for task in loaded["tasks"].values():
                        prepare_task(task, num_fewshot)
            except Exception as error:
                raise InputError(f"{asked}: the task {name} cannot be used: {one_line(error)}") from None
            for kind in self._loaded:
                self._loaded[kind] |= loaded[kind]

    def of_model(
        self,
        config: ResolvedConfig,
        tokenizer: Tokenizer,
        alive: Callable[[], None] = lambda: None,
        errors: bool = False,
    ) -> Callable[[Any], list[TaskResult]]:
        """Returns the function that evaluates weights on the ambient mesh; it calls `alive` after each piece."""
        model = HarnessModel(config, tokenizer, alive)

        def evaluate(weights: Any) -> list[TaskResult]:
            model.weights = weights
            with silence_harness():
                results = evaluator.evaluate(
                    model, self._loaded, limit=self.limit, bootstrap_iters=errors * RESAMPLES, log_samples=False
                )
            model.weights = None
            answers = []
            for task, values in (results["results"] | results.get("groups", {})).items():
                # The harness names a metric `metric,filter`, and its standard error `metric_stderr,filter`.
                for metric, value in values.items():
                    if "," in metric and "_stderr," not in metric and is_number(value):
                        error = values.get(metric.replace(",", "_stderr,", 1))
                        error = float(error) if is_number(error) else None
                        answers.append(TaskResult(task, metric.removesuffix(",none"), float(value), error))
            return answers

        return evaluate


def no_such_task(asked: str, name: str, folder: Path | None, known: Sequence[str]) -> str:
    """Returns the message for an unknown task."""
    if folder is None:
        return f"{asked}: lm-evaluation-harness has no task {name}{nearest(name, list(known))}"
    existing = f"it has {', '.join(known)}" if known else "it has none"
    damaged = []
    for file in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # as above
            damaged.append(f"\n  {file} cannot be read: {one_line(error)}")
    return f"{asked}: {folder} has no task {name}; {existing}{''.join(damaged)}"


def one_line(error: Exception) -> str:
    """Formats an exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def prepare_task(task: Any, num_fewshot: int | None) -> None:
    """Prepares a task and tries the request of its first document. ValueError if it cannot be used here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError("it runs code that the model writes")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError("it needs more than text")
    own = task.get_config("num_fewshot")
    # Zero is a deliberate choice of the task.
    task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=1, rank=0, world_size=1)


def is_number(value: Any) -> bool:
    """True for a result of the harness that is a number, not a text or a truth value."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


@contextlib.contextmanager
def silence_harness() -> Iterator[None]:
    """Suppresses bars, output and processes of the harness, and restores the global random state."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    log_of_harness = logging.getLogger("lm_eval")
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
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def make_scoring_step(config: ResolvedConfig) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Compiles the function (weights, batch) → (log p of the targets [B] in nats, whether all are greedy [B]).

    The targets of a row are where `loss_weights` is not zero. Every process gets all results.
    """
    # The run's own kernel may not support short rows.
    model = dataclasses.replace(config.model, attention_kernel="auto", context_attention="auto")
    config = dataclasses.replace(config, model=model)
    layout = training_layout(config.mesh)

    def scoring_step(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        log_p, is_first, loss_weights = predicted(config, weights, batch)
        counts = loss_weights > 0
        scores, greedy = jnp.sum(jnp.where(counts, log_p, 0.0), axis=1), jnp.all(is_first | ~counts, axis=1)
        return layout.reshard(scores, None), layout.reshard(greedy, None)

    return jax.jit(scoring_step, compiler_options=compiler_options())


class HarnessModel(LM):
    """A model with the interface that the harness asks; `weights` are set before each evaluation."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer, alive: Callable[[], None]):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.alive = alive
        self.weights: Any = None
        self._step = make_scoring_step(config)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns log p of each continuation in nats, and whether greedy decoding gives it."""
        return self.scores([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Returns log p of each whole text in nats, after the token that precedes every text."""
        pairs = [self.pair("", text) for (text,) in (request.args for request in requests)]
        return [score for score, _ in self.scores(pairs)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Returns continuations, each up to its first stop string, the end of text, or the largest length."""
        # Requests with the same settings are continued together.
        alike = dict[str, list[int]]()
        answers = [""] * len(requests)
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for numbers in alike.values():
            texts = self.continued([requests[i].args[0] for i in numbers], requests[numbers[0]].args[1])
            for i, text in zip(numbers, texts, strict=True):
                answers[i] = text
        return answers

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes context and continuation together, and cuts the tokens as the harness's own adapters do.

        Spaces at the context's end, and a token across the border, belong to the continuation.
        """
        tokens = self.tokenizer.encode_with_bos(context + continuation)
        before = self.tokenizer.encode_with_bos(context.rstrip())
        cut = max(min(len(before), len(tokens) - 1), len(self.tokenizer.bos_ids))
        return tokens[:cut], tokens[cut:]

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Returns for each pair of token lists the log p of the second after the first, and whether it is greedy."""
        T = self.config.data.segment_length
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(self.config.mesh))
        size = self.config.train.batch_size // self.config.train.accumulation_steps
        lengths = row_lengths(self.config)
        by_length = dict[int, list[tuple[int, list[int], int]]]()
        for i, pair in enumerate(pairs):
            for tokens, count in scoring_windows(*pair, T):
                length = next(length for length in lengths if length >= len(tokens) - 1)
                by_length.setdefault(length, []).append((i, tokens, count))
        scores = [(0.0, True)] * len(pairs)
        for length, of_length in sorted(by_length.items()):
            numbers = (i for i, _, _ in of_length)
            rows = (scoring_row(tokens, count, length) for _, tokens, count in of_length)
            for batch in stack_rows(rows, size * (T // length)):
                answers = jax.device_get(self._step(self.weights, put_on_devices(batch, sharding)))
                for score, greedy, i in zip(*(x.tolist() for x in answers), numbers, strict=False):
                    scores[i] = scores[i][0] + score, scores[i][1] and greedy
                self.alive()
        return scores

    def continued(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Returns continuations of the contexts, as `generate_until`."""
        options = normalize_gen_kwargs(settings, NEW_TOKENS)
        for name in sorted(options.keys() - GENERATION_SETTINGS):
            log.warning("generation_kwargs: %s has no effect", name)
        T = self.config.data.segment_length
        most = options["max_gen_toks"]
        # The context is as long as it can be with all new tokens in one segment.
        context_length = T - most if most < T else T // 2
        texts = [""] * len(contexts)
        for part in continuations(
            make_generator(self.config, self.weights, self.tokenizer),
            self.tokenizer,
            [self.tokenizer.encode_with_bos(context)[-context_length:] for context in contexts],
            max_new_tokens=most,
            sampling=Sampling(temperature=options.get("temperature", 0.0), top_k=options.get("top_k", 0)),
            stop=[stop for stop in options["until"] if stop],
            batch_size=self.config.train.batch_size // self.config.train.accumulation_steps,
        ):
            texts[part.number] += part.text
            self.alive()
        return texts


def row_lengths(config: ResolvedConfig) -> list[int]:
    """Returns the lengths of compiled rows, ascending: a segment, and its halves down to what the mesh can share."""
    layout = training_layout(config.mesh)
    T = config.data.segment_length
    time = layout.size("time")
    unit = math.lcm(layout.size("sequence"), 2 * time if time > 1 else 1)
    lengths = [T]
    while lengths[0] % (2 * unit) == 0 and lengths[0] // 2 >= SHORTEST:
        lengths.insert(0, lengths[0] // 2)
    return lengths


def scoring_windows(context: list[int], continuation: list[int], T: int) -> Iterator[tuple[list[int], int]]:
    """Yields (tokens, number of last ones that count) for a model of T positions to score a continuation.

    Every token of the continuation counts once, with the longest context that fits. For a whole text these are the
    harness's disjoint windows.
    """
    for start in range(0, len(continuation), T):
        part = continuation[start : start + T]
        before = (context + continuation[:start])[-(T + 1 - len(part)) :]
        yield before + part, len(part)


def scoring_row(tokens: Sequence[int], count: int, length: int) -> dict[str, np.ndarray]:
    """Makes a row of `length` that reads all tokens but the last; its last `count` tokens are the targets."""
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
