"""The training run, told from top to bottom: prepare, restore, train, end."""

import collections
import dataclasses
import faulthandler
import itertools
import time
from contextlib import ExitStack, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.errors import StorageError
from data.loader import Loader, gather_positions, is_over
from model.generate import generate
from train.begin import begin
from train.checkpoint import Checkpoints
from train.config import Config
from train.evaluate import evaluate, evaluation_metrics, make_evaluation_step
from train.events import Events, start_fields
from train.lease import Lease
from train.mesh import GENERATION, batch_sharding, make_mesh, once, training_layout
from train.metrics import Display, Rate, StepLog, flops_per_token, peak_flops
from train.optimizer import make_optimizer
from train.prepare import Prepared, data_fingerprint, prepare, some_of
from train.profiling import Profiler
from train.report import opening
from train.run import Run
from train.schedule import batch_size
from train.state import evaluated_weights
from train.step import Programs
from train.stop import Agreement, Stopped, StopSignals
from train.storage import writing
from train.watch import compact
from train.weights import check_export_folder, exported_step, why_no_export, write_huggingface


def pretrain(config: Config) -> Run:
    """Train to `train.num_steps`, from the beginning or from the newest checkpoint in `train.run_dir`.

    It ends before, once a corpus with a number of epochs has been read so often.

    All processes call it together.

    Raises:
        InputError: whatever the user got wrong, before any device time is spent.
        Stopped: a signal has asked it to end before; what it has done is saved.
    """
    run = Run.of(config)
    events = Events(run.events if jax.process_index() == 0 else None, config.train.on_event)
    exports = config.checkpoint.export and why_no_export(config.model) is None
    if exports:
        check_export_folder(run.export)
    mesh = make_mesh(config.resolved(config.tokenizer.vocab_size))

    with ExitStack() as stack:
        display = Display(config.train.num_steps, config.train.log_every_steps, quiet=jax.process_index() > 0)
        stack.callback(display.close)
        signals = stack.enter_context(StopSignals(display.say))
        lease = Lease(run.lease)
        stack.callback(lease.release)
        prepared = prepare(config, run, lease)
        config = prepared.config
        stack.enter_context(jax.set_mesh(mesh))
        stack.callback(events.close)
        events.note_crash(lease.last_beat)

        # ── New weights, or those of a checkpoint ──────────────────────────────────────────────────────────────────
        optimizer = make_optimizer(config)
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)
        begun = begin(prepared, run, checkpoints, optimizer)
        prepared, state = begun.prepared, begun.state
        once(lambda: run.save_config(config))
        first = int(state["step"])
        if first < config.train.num_steps and not begun.over:
            of_data = data_fingerprint(prepared.identity)
            events.write("start", step=first, **begun.fields, **start_fields(config, of_data))
            try:
                state = train(prepared, run, display, checkpoints, state, begun.positions, signals, events)
                events.account.turn_to("checkpoint")
                checkpoints.wait()
            except Stopped:
                raise
            except BaseException as error:
                # The first error counts, whatever else a full disk makes of this.
                with suppress(StorageError):
                    events.write("fault", error=f"{type(error).__name__}: {error}")
                with suppress(StorageError):
                    # What is being written is good, whatever has happened since.
                    checkpoints.wait()
                raise
        step = int(state["step"])

        # ── The end ────────────────────────────────────────────────────────────────────────────────────────────────
        if exports and (first < step or exported_step(run.export) != step):
            whole = multihost_utils.process_allgather(evaluated_weights(state), tiled=True)
            context = config.data.segment_length
            with writing("the export", run.export):
                once(lambda: write_huggingface(run.export, config.model, whole, prepared.tokenizer, context, step))
        if first < step:
            events.write("end", step=step)
    return run


def train(
    prepared: Prepared,
    run: Run,
    display: Display,
    checkpoints: Checkpoints,
    state: dict[str, Any],
    positions: np.ndarray,
    signals: StopSignals,
    events: Events,
) -> dict[str, Any]:
    """The loop: from `state` and the data at `positions` to the state after the last step.

    Raises:
        Stopped: a process of the run has had a signal; the state is being saved.
    """
    config, tokenizer = prepared.config, prepared.tokenizer
    optimizer, step, last_step = make_optimizer(config), int(state["step"]), config.train.num_steps
    programs, evaluation_step = Programs(config, optimizer), make_evaluation_step(config)
    data = data_fingerprint(prepared.identity)
    some_held_out = some_of(prepared.held_out, config.evaluation.loop_bytes)
    flops = flops_per_token(config.model, config.data.segment_length)
    peak, source = peak_flops(config.model.compute_dtype)
    for line in opening(prepared, step, source):
        display.say(line)
    agreement, stops = Agreement(), False

    with ExitStack() as stack:
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh))
        loader = stack.enter_context(
            Loader(
                prepared.mixture,
                tokenizer,
                config.data,
                config.train.seed,
                (batch_size(config, s) for s in itertools.count(step)),
                sharding,
                positions,
                step,
            )
        )
        logs = None
        if jax.process_index() == 0:
            board = run.folder / "tensorboard" if config.train.tensorboard else None
            # The data may go on elsewhere than before, so the step that it goes on from is logged anew.
            logs = StepLog(run.metrics, step, board), StepLog(run.positions, step - 1)
            for log in logs:
                stack.callback(log.close)
            logs[1].write({"step": step, "data": data, "positions": positions.tolist()})
        profiler = Profiler(run.profile, config.train.profile_steps, step)
        stack.callback(profiler.stop)
        rate, rows_left = Rate(), sum(batch_size(config, s) for s in range(step, last_step))
        rate.start()
        # Steps that the devices have been given and that nothing has been said of: never more than two, so that the
        # devices always have work while the host writes down what they did before.
        underway: collections.deque[tuple[int, Any, float, Any]] = collections.deque()

        signals.noted = True
        stack.callback(faulthandler.cancel_dump_traceback_later)
        while step < last_step and not stops:
            still_alive(config)
            asked = time.perf_counter()
            events.account.turn_to("data")
            batch, positions, left = next(loader)
            events.account.turn_to("steps")
            waited = time.perf_counter() - asked
            step += 1
            if is_over(left, prepared.mixture):
                last_step = step
            if not programs.has(step):
                # Nothing is underway, so that no step's time has this in it.
                events.account.turn_to("compile")
                programs.compiled(step, state, batch)
                events.account.turn_to("steps")
                rate.start()
            if step == profiler.first:
                profiler.start(programs.compiled(step, state, batch), state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = programs(step, state, batch)
            underway.append((step, metrics, waited, agreement.send([signals.asked])))

            saves = step == last_step or step % config.checkpoint.every_steps == 0
            # The first evaluation comes after the first step: what is wrong with it should show at once.
            evaluates = bool(some_held_out) and (step in (1, last_step) or step % config.evaluation.every_steps == 0)
            pauses = saves or evaluates or step == profiler.last or not programs.has(step + 1)
            while len(underway) > (0 if pauses or stops else 1):
                of_step, metrics, waited, asked_of = underway.popleft()
                stops = stops or (bool(np.asarray(asked_of).any()) and step < last_step)
                record: dict[str, Any] = jax.tree.map(lambda x: x.tolist(), jax.device_get(metrics))
                rate.finished(record["loss_weight"])
                rows = batch_size(config, of_step - 1)
                rows_left -= rows
                record = {"step": of_step} | record | {
                    "utilization": record["loss_weight"] / (rows * config.data.segment_length),
                    "tokens_per_second": rate.tokens_per_second, "data_wait_seconds": waited,
                }  # fmt: skip
                seconds_left = rate.seconds(rows_left * config.data.segment_length)
                display.step(record, rate.tokens_per_second * flops / peak, seconds_left)
                if "watch" in record:
                    display.say(f"step {of_step}  {compact(record['watch'])}")
                if step == profiler.last and not underway:
                    profiler.stop(display.say)
                    rate.start()
                if evaluates and not underway and not stops:
                    still_alive(config)
                    events.account.turn_to("evaluation")
                    texts = prepared.held_out if step == last_step else some_held_out
                    weights = evaluated_weights(state)
                    results = evaluate(evaluation_step, weights, texts, tokenizer, config)
                    record |= evaluation_metrics(results) | {"sample": sample_text(prepared, weights)}
                    display.evaluation(record)
                    events.account.turn_to("steps")
                    rate.start()
                if logs:
                    logs[0].write(record)
            if saves or stops or step % config.data.positions_every_steps == 0:
                where = gather_positions(positions).tolist()
                if logs:
                    logs[1].write({"step": step, "data": data, "positions": where})
            if saves or stops:
                progress = {"positions": where, "identity": prepared.identity}
                still_alive(config)
                events.account.turn_to("checkpoint")
                begun = time.perf_counter()
                checkpoints.save(state, progress | {"is_over": is_over(left, prepared.mixture)})
                stall = round(time.perf_counter() - begun, 3)
                events.write("save", step=step, stall_seconds=stall)
                events.account.turn_to("steps")
                rate.start()
        signals.noted = False
    if prepared.mixture.skipped:
        display.say(f"{prepared.mixture.skipped} documents could not be read and were left out")
    if stops:
        events.account.turn_to("checkpoint")
        checkpoints.wait()
        events.write("stop", step=step)
        raise Stopped(step)
    return state


def still_alive(config: Config) -> None:
    """Unless this is called again in time, the process shows where all its threads stand and ends with status 1.

    A collective that waits for a process that is no more, or a dead file system, would wait for ever.
    """
    if config.train.watchdog_seconds:
        # To the descriptor: what stands for standard error may be no file.
        faulthandler.dump_traceback_later(config.train.watchdog_seconds, exit=True, file=2)


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
