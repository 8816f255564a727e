"""Averages of checkpoints, as a run of their own.

The average of checkpoints of a run at a constant learning rate is close to what a decay of that rate would have given,
and needs no training (Sanyal et al. 2023, arXiv:2306.03241; WSM: Tian et al. 2025, arXiv:2507.17634).
"""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from data.errors import InputError
from data.files.atomic import check_new
from data.tokenizer.tokenizer import Tokenizer
from model.interchange.tensors import ParameterReader, whole_parameter
from model.parameters import count_parameters, parameter_table
from model.trees import nested
from train.checkpoint.checkpoint import Checkpoints
from train.config.changes import changes_of
from train.config.config import Config, ResolvedConfig
from train.config.parameter_groups import parameter_settings
from train.run.events import Events
from train.run.folder import Run
from train.run.run_name import split_name
from train.run.storage import check_free_space, check_place
from train.step.schedule import learning_rate
from train.weights.huggingface import is_export
from train.weights.load import check_tokenizer, open_run
from train.weights.weights_run import write_weights_run

EQUAL, GIVEN, DECAY = "equal weights", "given weights", "linear decay"


class Part(NamedTuple):
    """A checkpoint that is averaged, open for reading."""

    name: str
    run: Run
    config: ResolvedConfig
    tokenizer: Tokenizer
    step: int
    read: ParameterReader
    averaged: bool  # true for the moving average of its weights


def merge(names: Sequence[str], to: Path, weights: Sequence[float] | None = None, decay: bool = False) -> list[str]:
    """Writes a run with the average of two or more checkpoints, each a RUN or RUN@STEP; returns warnings.

    Sums are in float64, one parameter at a time, so that only the result is in memory as a whole; it is float32. The
    settings, the held-out documents and the copy of the default corpus are those of the first checkpoint's run. A
    checkpoint with a moving average gives that, as everywhere; but for a decay it gives the trained weights.

    Args:
        weights: one number at or above 0 for each checkpoint, of which the shares count; None for equal ones.
        decay: take `decay_weights` instead.

    Raises:
        InputError: checkpoints are missing or damaged, or don't fit each other, with all problems at once; or `to`
            exists.
        StorageError: the disk does not have enough room.
    """
    check_new(to)
    to = to.resolve()
    check_place(Run(to).checkpoints)
    parts, problems = _open_parts(names, averaged=not decay)
    problems += _misfits(parts) + _weight_problems(names, weights)
    if decay:
        problems += _decay_problems(parts)
    if problems:
        raise InputError("\n".join(problems))
    if decay:
        weights = decay_weights([part.step for part in parts])
    scheme = DECAY if decay else EQUAL if weights is None else GIVEN
    weights = weights or [1] * len(parts)
    run, saved = Run.load(parts[0].run.folder)
    held_out = run.held_out_texts()

    def add(made: Run) -> None:
        copied = run.snapshot.stat().st_size if run.snapshot.exists() else 0
        check_free_space(made.folder, 4 * count_parameters(parts[0].config.model) + copied)
        made.save_held_out(held_out)
        if copied:
            made.snapshot.parent.mkdir()
            shutil.copyfile(run.snapshot, made.snapshot)
        origins = [
            {
                "run": str(part.run.folder.resolve()),
                "step": part.step,
                "weight": weight / sum(weights),
                "average": part.averaged,
            }
            for part, weight in zip(parts, weights, strict=True)
        ]
        Events(made.events).write("merge", scheme=scheme, of=origins)

    write_weights_run(to, _settings(saved, to), parts[0].tokenizer, lambda: _averaged(parts, weights), add)
    return _decay_warnings(parts, saved.resolved(parts[0].tokenizer.vocab_size)) if decay else []


def decay_weights(steps: Sequence[int]) -> list[int]:
    """Returns weights of checkpoints, times 2D, whose average equals a linear decay of the rate to 0 over their span.

    With the steps s₀ < … < sₙ, weights c₀ … cₙ that sum to 1, and θₛ = θₛ₋₁ − η uₛ at the constant rate η,

        Σⱼ cⱼ θ(sⱼ) = θ(s₀) − η Σₛ f(s) uₛ,  f(s) = Σⱼ cⱼ over all sⱼ ≥ s:

    the average is one run from s₀ on, in which the rate of each update is multiplied by f. A decay whose last update,
    that of step sₙ, has the rate 0 wants f(s) = (sₙ − s)/D with D = sₙ − s₀, as `wsd` with `final_fraction` 0 has. f is
    constant between two checkpoints, so it takes the mean of those factors: over sᵢ₋₁ < s ≤ sᵢ that is
    (sₙ − (sᵢ₋₁ + sᵢ + 1)/2)/D. Differences of neighbours give

        c₀ = (s₁ − s₀ + 1)/2D,  cⱼ = (sⱼ₊₁ − sⱼ₋₁)/2D,  cₙ = (sₙ − sₙ₋₁ − 1)/2D,

    the trapezoid rule but for 1/2D. For updates that do not depend on the rate, as SGD's on a linear loss, this is
    exact with a checkpoint of every step; with fewer, it takes the updates between two as equal. (WSM, Tian et al.
    2025, arXiv:2507.17634, derives weights in this way for any decay.)
    """
    before, after = [steps[0] - 1, *steps[:-1]], [*steps[1:], steps[-1] - 1]
    return [later - earlier for earlier, later in zip(before, after, strict=True)]


def _open_parts(names: Sequence[str], averaged: bool) -> tuple[list[Part], list[str]]:
    """Returns the checkpoints that can be opened, and a problem for each of the others."""
    parts, problems = [], [] if len(names) > 1 else ["give two checkpoints or more, as in RUN@900 RUN@1000"]
    for name in names:
        try:
            parts.append(_open_part(name, averaged))
        except InputError as error:
            problems.append(str(error))
    return parts, problems


def _open_part(name: str, averaged: bool) -> Part:
    folder, step = split_name(name)
    if is_export(folder):
        raise InputError(f"{name} holds exported weights; make a run of them with `ziggurat import`")
    run, config, tokenizer = open_run(folder)
    checkpoints = Checkpoints(run.checkpoints)
    try:
        step, read = checkpoints.open_weights(parameter_table(config.model), step, averaged)
        progress = checkpoints.progress(step)
    finally:
        checkpoints.close()
    check_tokenizer(tokenizer, progress)
    has_average = "average" in progress["checksums"]
    return Part(name, run, config, tokenizer, step, read, averaged and has_average)


def _misfits(parts: Sequence[Part]) -> list[str]:
    """Returns a line for each setting of a model and each tokenizer unlike the first one's, and for repeated names."""
    problems = []
    seen: dict[tuple[Path, int], str] = {}
    for part in parts:
        first = parts[0]
        for field, before, now in changes_of(first.config, part.config)["frozen"]:
            if field.startswith("model."):
                problems.append(f"{part.name}: {field} is {now}, and {before} in {first.name}; give runs of one model")
        if part.tokenizer.fingerprint != first.tokenizer.fingerprint:
            problems.append(f"{part.name}: its tokenizer is not that of {first.name}; give runs with the same one")
        key = (part.run.folder.resolve(), part.step)
        if key in seen:
            problems.append(f"{part.name} is {seen[key]}; name each checkpoint once, and give it a weight (--weights)")
        seen[key] = part.name
    return problems


def _weight_problems(names: Sequence[str], weights: Sequence[float] | None) -> list[str]:
    if weights is None:
        return []
    problems = []
    if len(weights) != len(names):
        problems.append(f"--weights has {len(weights)} numbers for {len(names)} checkpoints; give one for each")
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < sum(weights) < math.inf:
        problems.append("--weights must be numbers at or above 0, one of them above")
    return problems


def _decay_problems(parts: Sequence[Part]) -> list[str]:
    folders, steps = {part.run.folder.resolve() for part in parts}, [part.step for part in parts]
    problems = []
    if len(folders) > 1:
        problems.append(
            "--decay takes the checkpoints of one run, whose steps it weighs; leave it out for several runs"
        )
    if steps != sorted(set(steps)):
        problems.append(f"--decay takes checkpoints in the order of their steps; they are {steps}")
    return problems


def _decay_warnings(parts: Sequence[Part], config: ResolvedConfig) -> list[str]:
    """Returns a line if the learning rate of any parameter changes between the first and the last checkpoint."""
    first, last = parts[0].step, parts[-1].step
    for settings in {repr(s): s for s in parameter_settings(config).values()}.values():
        schedule = learning_rate(dataclasses.replace(config, optimizer=settings))
        rates = np.broadcast_to(schedule(jnp.arange(first, last)), last - first)
        if not np.allclose(rates, rates[0], rtol=1e-5, atol=0.0):
            return [
                f"the learning rate of {parts[0].run.folder} is not constant from step {first} to {last}: "
                f"it goes from {rates.max():.3g} to {rates.min():.3g}, which the average adds its decay to"
            ]
    return []


def _settings(config: Config, to: Path) -> Config:
    """Returns the settings of the merged run: those of the first one, as if it had begun from these weights."""
    train = dataclasses.replace(config.train, run_dir=str(to), init_from=None, init_with="all")
    return dataclasses.replace(config, train=train, checkpoint=dataclasses.replace(config.checkpoint, dir=None))


def _averaged(parts: Sequence[Part], weights: Sequence[float]) -> dict[str, Any]:
    """Returns the weighted mean of the parameters, nested, one parameter and one checkpoint after the other.

    With weights that are whole numbers, sums of similar float32 are exact in float64, so their order changes no bit.
    """

    def read(name: str, layer: int | None) -> np.ndarray:
        total: Any = 0.0
        for part, weight in zip(parts, weights, strict=True):
            array = part.read(name, layer)
            if not np.isfinite(array).all():
                raise InputError(f"{part.name}: {name} has NaN or infinite values; take another step")
            total = total + weight * array.astype(np.float64)
        return np.asarray(total / sum(weights), np.float32)

    table = parameter_table(parts[0].config.model)
    return nested({name: jnp.asarray(whole_parameter(name, p, read)) for name, p in table.items()})
