"""The training run, told from top to bottom: prepare, restore, train, end."""

import collections
import dataclasses
import itertools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.loader import Loader, gather_positions
from model.generate import generate
from train.checkpoint import Checkpoints
from train.config import Config
from train.evaluate import evaluate, make_evaluation_step
from train.mesh import GENERATION, batch_sharding, make_mesh, once
from train.metrics import Display, MetricsFile, Rate, flops_per_token, peak_flops
from train.optimizer import make_optimizer
from train.prepare import Prepared, check_fingerprints, prepare, up_to
from train.profiling import Profiler
from train.report import opening
from train.run import Run
from train.schedule import batch_size
from train.state import abstract_state, evaluated_weights, make_state
from train.step import Programs
from train.watch import compact
from train.weights import check_export_folder, exported_step, why_no_export, write_huggingface


def pretrain(config: Config) -> Run:
    """Train to `train.num_steps`, from the beginning or from the newest checkpoint in `train.run_dir`.

    All processes call it together.

    Raises:
        InputError: whatever the user got wrong, before any device time is spent.
    """
    run = Run(Path(config.train.run_dir).expanduser())
    exports = config.checkpoint.export and why_no_export(config.model) is None
    if exports:
        check_export_folder(run.export)
    mesh = make_mesh(config.resolved(config.tokenizer.vocab_size))
    prepared = prepare(config, run)
    config = prepared.config

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        display = Display(config.train.num_steps, config.train.log_every_steps, quiet=jax.process_index() > 0)
        stack.callback(display.close)

        # ── Fresh weights, or the newest checkpoint ────────────────────────────────────────────────────────────────
        optimizer = make_optimizer(config)
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)
        if restored := checkpoints.restore(abstract_state(config, optimizer)):
            state, progress = restored
            check_fingerprints(progress["fingerprints"], prepared.fingerprints, config)
            positions = np.array(progress["positions"], np.int32)
        else:
            state, positions = make_state(config, optimizer), None
        once(lambda: run.save_config(config))
        step = int(state["step"])

        if step < config.train.num_steps:
            state = train(prepared, run, display, checkpoints, state, positions)

        # ── The end ────────────────────────────────────────────────────────────────────────────────────────────────
        if exports and (step < config.train.num_steps or exported_step(run.export) != step):
            whole = multihost_utils.process_allgather(evaluated_weights(state), tiled=True)
            context, last = config.data.segment_length, config.train.num_steps
            once(lambda: write_huggingface(run.export, config.model, whole, prepared.tokenizer, context, last))
    return run


def train(
    prepared: Prepared,
    run: Run,
    display: Display,
    checkpoints: Checkpoints,
    state: dict[str, Any],
    positions: np.ndarray | None,
) -> dict[str, Any]:
    """The loop: from `state` and the data at `positions` (none: the beginning) to the state after the last step."""
    config, tokenizer = prepared.config, prepared.tokenizer
    optimizer, step, last_step = make_optimizer(config), int(state["step"]), config.train.num_steps
    programs, evaluation_step = Programs(config, optimizer), make_evaluation_step(config)
    some_held_out = up_to(prepared.held_out, config.evaluation.loop_bytes)
    flops = flops_per_token(config.model, config.data.segment_length)
    peak, source = peak_flops(config.model.compute_dtype)
    for line in opening(prepared, step, source):
        display.say(line)

    with ExitStack() as stack:
        sharding = batch_sharding(jax.sharding.get_mesh())
        loader = stack.enter_context(
            Loader(
                prepared.corpus,
                tokenizer,
                config.data,
                config.train.seed,
                (batch_size(config, s) for s in itertools.count(step)),
                config.num_streams,
                sharding,
                positions,
            )
        )
        metrics_file = MetricsFile(run.folder, step, config.train.tensorboard) if jax.process_index() == 0 else None
        if metrics_file:
            stack.callback(metrics_file.close)
        profiler = Profiler(run.profile, config.train.profile_steps, step)
        stack.callback(profiler.stop)
        rate, rows_left = Rate(), sum(batch_size(config, s) for s in range(step, last_step))
        rate.start()
        # Steps that the devices have been given and that nothing has been said of: never more than two, so that the
        # devices always have work while the host writes down what they did before.
        underway: collections.deque[tuple[int, Any, float]] = collections.deque()

        while step < last_step:
            asked = time.perf_counter()
            batch, positions = next(loader)
            waited = time.perf_counter() - asked
            step += 1
            if not programs.has(step):
                # Nothing is underway, so that no step's time has this in it.
                programs.compiled(step, state, batch)
                rate.start()
            if step == profiler.first:
                profiler.start(programs.compiled(step, state, batch), state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = programs(step, state, batch)
            underway.append((step, metrics, waited))

            saves = step == last_step or step % config.checkpoint.every_steps == 0
            # The first evaluation comes after the first step: what is wrong with it should show at once.
            evaluates = bool(prepared.held_out) and (
                step in (1, last_step) or step % config.evaluation.every_steps == 0
            )
            pauses = saves or evaluates or step == profiler.last or not programs.has(step + 1)
            while len(underway) > (0 if pauses else 1):
                of_step, metrics, waited = underway.popleft()
                record: dict[str, Any] = jax.tree.map(lambda x: x.tolist(), jax.device_get(metrics))
                rate.finished(record["loss_weight"])
                rows_left -= batch_size(config, of_step - 1)
                record = {"step": of_step} | record | {
                    "tokens_per_second": rate.tokens_per_second, "data_wait_seconds": waited
                }  # fmt: skip
                seconds_left = rate.seconds(rows_left * config.data.segment_length)
                display.step(record, rate.tokens_per_second * flops / peak, seconds_left)
                if "watch" in record:
                    display.say(f"step {of_step}  {compact(record['watch'])}")
                if step == profiler.last and not underway:
                    profiler.stop(display.say)
                    rate.start()
                if evaluates and not underway:
                    texts = prepared.held_out if step == last_step else some_held_out
                    weights = evaluated_weights(state)
                    result = evaluate(evaluation_step, weights, texts, tokenizer, config)
                    record |= result.metrics() | {"sample": sample_text(prepared, weights)}
                    display.evaluation(record)
                    rate.start()
                if metrics_file:
                    metrics_file.write(record)
            if saves:
                assert positions is not None
                where = {"positions": gather_positions(positions).tolist(), "fingerprints": prepared.fingerprints}
                checkpoints.save(state, where)
                rate.start()
    return state


def sample_text(prepared: Prepared, weights: Any) -> str:
    """The prompt of `evaluation.prompt`, continued: the 40 most likely tokens at each place, always the same seed."""
    config, tokenizer = prepared.config, prepared.tokenizer
    prompt = tokenizer.encode(config.evaluation.prompt).tolist()
    tokens = generate(
        # What the tokenizer has no text for is not drawn.
        dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size),
        weights,
        prompt,
        context=config.data.segment_length,
        eos_id=tokenizer.eos_id,
        max_new_tokens=config.evaluation.sample_tokens,
        top_k=40,
        layout=GENERATION,
    )
    return tokenizer.decode([*prompt, *tokens])
