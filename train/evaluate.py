"""Loss and bits per byte on whole documents, and a sample."""

import gzip
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from data.errors import InputError
from data.segmenter import Pairs, make_pairs, segment_documents
from data.tokenizer import Tokenizer
from model.decoder import Decoder
from model.sampling import Sampling
from train.config import Config, EvaluationConfig
from train.continuation import make_generator
from train.inspection import token_text
from train.mesh import TRAINING, batch_sharding, training_layout
from train.run import Text
from train.step import counted, summed_loss
from train.xla import compiler_options

if TYPE_CHECKING:
    # The harness is imported where it is used.
    from train.tasks import Tasks


@dataclass(frozen=True)
class Evaluation:
    """Result over a set of documents: `loss` in nats a token; `bits_per_byte` of their UTF-8 text, EOS included."""

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int


def total(results: Iterable[Evaluation]) -> Evaluation:
    """Of several sets of documents as one."""
    results = list(results)
    tokens, size = sum(result.tokens for result in results), sum(result.bytes for result in results)
    nats = sum(result.loss * result.tokens for result in results)
    return Evaluation(nats / tokens, nats / math.log(2) / size, tokens, size, sum(r.documents for r in results))


def evaluation_metrics(by_corpus: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Fields of a line of metrics.jsonl: of all documents, and of each corpus where there are several."""

    def fields(result: Evaluation) -> dict[str, float]:
        return {f"validation_{name}": asdict(result)[name] for name in ("loss", "bits_per_byte", "tokens")}

    found: dict[str, Any] = fields(total(by_corpus.values()))
    if len(by_corpus) > 1:
        found["validation_by_corpus"] = {name: fields(result) for name, result in by_corpus.items()}
    return found


@dataclass(frozen=True)
class Result:
    """The metric of a task or group of tasks; `error` is its standard error, where it is known."""

    task: str
    metric: str
    value: float
    error: float | None


def task_metrics(results: Iterable[Result]) -> dict[str, Any]:
    """The field `tasks` of a line of metrics.jsonl: values by task and metric."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        found.setdefault(result.task, {})[result.metric] = result.value
    return {"tasks": found}


Batch = Mapping[str, jax.Array]
EvaluationStep = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def make_evaluation_step(config: Config) -> EvaluationStep:
    """The compiled function (weights, batch) → (summed loss in nats, summed loss weight)."""

    def evaluation_step(weights: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch, loss_weight = counted(batch)
        return summed_loss(config, weights, batch)[1], loss_weight

    return jax.jit(evaluation_step, compiler_options=compiler_options())


def evaluate(
    step: EvaluationStep,
    weights: Any,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    config: Config,
) -> dict[str, Evaluation]:
    """Evaluate documents, one after the other and cut into segments: each token is predicted from its segment alone.

    Args:
        step: from `make_evaluation_step`.
        weights: nested, on the run's mesh.
        texts: whole documents; every process gives the same ones.
        tokenizer: of the run.
        config: batch size, segment length and masking.

    Returns:
        Of each corpus by its name, figures over all tokens of all its documents, their EOS included.
    """
    names = dict.fromkeys(text.corpus for text in texts)
    return {
        name: _evaluate(step, weights, [text for text in texts if text.corpus == name], tokenizer, config)
        for name in names
    }


def _evaluate(
    step: EvaluationStep, weights: Any, texts: Sequence[Text], tokenizer: Tokenizer, config: Config
) -> Evaluation:
    sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))

    def pairs(text: Text) -> Pairs:
        prompt = tokenizer.encode(text.prompt)
        tokens = np.concatenate([prompt, tokenizer.encode(text.text)])
        return make_pairs(tokens, tokenizer.bos_id, tokenizer.eos_id, prompt=len(prompt))

    rows = segment_documents(map(pairs, texts), config.data)
    batch_size = config.train.batch_size // config.train.accumulation_steps
    loss = weight = 0.0
    for batch in batches(rows, batch_size):
        batch_loss, batch_weight = step(weights, placed(batch, sharding))
        loss, weight = loss + float(batch_loss), weight + float(batch_weight)
    size = sum(len(text.text.encode()) for text in texts)
    return Evaluation(loss / weight, loss / math.log(2) / size, int(weight), size, len(texts))


def placed(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> Batch:
    """Arrays that every process has, on the devices."""
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


def batches(rows: Iterable[dict[str, np.ndarray]], size: int) -> Iterable[dict[str, np.ndarray]]:
    """Rows [T] stacked `size` at a time [size, T]; the last batch is filled up with rows of no weight."""
    rows = iter(rows)
    while group := list(itertools.islice(rows, size)):
        empty = {name: np.zeros_like(array) for name, array in group[0].items()}
        group += [empty] * (size - len(group))
        yield {name: np.stack([row[name] for row in group]) for name in empty}


def open_tasks(
    names: str, folder: str | None, limit: int | None, num_fewshot: int | None = None, asked: str = "evaluation.tasks"
) -> "Tasks":
    """Tasks by their names, as in a,b; see `train.tasks.Tasks`. InputError also where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{asked} needs the package lm-eval: pip install -e '.[tasks]'")
    given = [name for part in names.split(",") if (name := part.strip())]
    if not given:
        raise InputError(f"{asked} is empty; name a task, as in {asked}=hellaswag")
    from train.tasks import Tasks

    return Tasks(given, folder, limit, num_fewshot, asked)


def run_tasks(config: EvaluationConfig) -> "Tasks | None":
    """The tasks that a run is evaluated on, if any. InputError as of `open_tasks`."""
    return None if config.tasks is None else open_tasks(config.tasks, config.task_dir, config.task_limit)


def inspect_positions(
    config: Config, weights: Any, tokenizer: Tokenizer, tokens: np.ndarray, best: int
) -> list[dict[str, Any]]:
    """What one pass over the beginning of a document predicts at each position.

    Args:
        config: of the model.
        weights: nested, on the ambient mesh.
        tokenizer: of the model.
        tokens: int32 [n], fewer than a segment.
        best: how many predictions are wanted.

    Returns:
        n + 1 rows: "position" from 0, "input" and "target" (texts), "loss" in nats, and the "best" predictions, each
        with "token" and "probability". The first input is what stands before a text; the last row has no target.
    """
    inputs = np.array([tokenizer.bos_id, *tokens], np.int32)

    @jax.jit
    def log_probabilities(weights: Any, tokens_BT: jax.Array) -> jax.Array:
        decoder = Decoder(config.model, weights, TRAINING)
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = decoder(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
        return jax.nn.log_softmax(decoder.logits(x_BTD))[0]

    log_p_TV = np.asarray(log_probabilities(weights, inputs[None]))
    order_TV = np.argsort(-log_p_TV, axis=1)[:, :best]

    text = partial(token_text, tokenizer)
    return [
        {
            "position": t,
            "input": text(int(inputs[t])),
            "target": text(int(tokens[t])) if t < len(tokens) else None,
            "loss": -float(log_p_TV[t, tokens[t]]) if t < len(tokens) else None,
            "best": [{"token": text(int(v)), "probability": math.exp(log_p_TV[t, v])} for v in order_TV[t]],
        }
        for t in range(len(inputs))
    ]


def gzip_bits_per_byte(texts: Sequence[Text]) -> float:
    """What `gzip -9` needs for the same documents, one by one: the figure to be below."""
    encoded = [text.text.encode() for text in texts]
    return 8 * sum(len(gzip.compress(text, 9, mtime=0)) for text in encoded) / sum(map(len, encoded))


def sample_text(config: Config, tokenizer: Tokenizer, weights: Any) -> str:
    """The prompt of `evaluation.prompt`, continued: the 40 most likely tokens at each place, always the same seed."""
    prompt = tokenizer.begin(config.evaluation.prompt)
    generator = make_generator(config, weights, tokenizer)
    pieces = generator([prompt], max_new_tokens=config.evaluation.sample_tokens, sampling=Sampling(top_k=40))
    return tokenizer.decode([*prompt, *(token for piece in pieces for token in piece.tokens)])
