"""The training run, told from top to bottom: prepare, restore, train, heal, end."""

import collections
import faulthandler
import itertools
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from data.errors import StorageError
from data.loader import LoadedBatch, Loader, corpus_has_ended, gather_positions
from train.checkpoint.checkpoint import Checkpoints
from train.checkpoint.replicas import check_replicas, is_finite
from train.config.config import Config
from train.data_identity import RunInputs, data_fingerprint
from train.devices.agreement import Agreement
from train.devices.mesh import batch_sharding, make_mesh
from train.devices.processes import all_gather_json, on_first_process
from train.devices.rules import training_layout
from train.display import Display, Rate, opening_lines
from train.evaluation.documents import first_of_each_corpus
from train.evaluation.held_out import evaluate, make_evaluation_step, sample_text
from train.evaluation.results import evaluation_metrics, task_metrics
from train.prepare import prepare_run
from train.profiling import Profiler
from train.run.events import Events, start_fields
from train.run.folder import Run
from train.run.lease import Lease
from train.run.ledger import SKIP, Ledger
from train.run.step_log import StepLog
from train.run.storage import writing
from train.run.trackers import open_writers
from train.starting_point import find_starting_point
from train.step.flops import flops_per_token, memory_bytes, peak_flops
from train.step.optimizer import make_optimizer
from train.step.schedule import batch_size
from train.step.spike_detector import Anomaly, SpikeDetector
from train.step.state import evaluated_weights
from train.step.step import StepPrograms
from train.step.watch import compact
from train.stop import Stopped, StopSignals, reset_watchdog
from train.weights.huggingface import check_export_folder, exported_step, why_no_export
from train.weights.load import export_run


def pretrain(config: Config) -> Run:
    """Train to `train.num_steps`, from the beginning or from the newest checkpoint in `train.run_dir`.

    It ends before, once a corpus with a number of epochs has been read so often.

    All processes call it together.

    Raises:
        InputError: whatever the user got wrong, before any device time is spent; or too many rows stood out.
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
        prepared = prepare_run(config, run, lease)
        config = prepared.config
        stack.enter_context(jax.set_mesh(mesh))
        stack.callback(events.close)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        events.note_crash(lease.last_beat)
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)

        training = Training(prepared, run, display, checkpoints, signals, events)
        on_first_process(lambda: run.save_config(config))
        first = training.step
        if first < config.train.num_steps and not training.begun.over:
            fields = start_fields(config, data_fingerprint(prepared.identity))
            events.write("start", step=first, **training.begun.fields, **fields)
            try:
                training.to_the_end()
                events.account.turn_to("checkpoint")
                checkpoints.wait()
                signals.noted = False
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
        step = training.step

        if exports and (first < step or exported_step(run.export) != step):
            with writing("the export", run.export):
                on_first_process(lambda: export_run(run, config, checkpoints, prepared.tokenizer, step))
        if first < step:
            events.write("end", step=step)
    return run


class Underway(NamedTuple):
    """A step that the devices have been given: its metrics, and what each process has said of it, on their way."""

    step: int
    metrics: Any
    said: Any


class Training:
    """One start of a run.

    Attributes:
        state: of the training, after `step` steps.
        step: how many are done.
        begun: what it went on from.
    """

    def __init__(
        self,
        prepared: RunInputs,
        run: Run,
        display: Display,
        checkpoints: Checkpoints,
        signals: StopSignals,
        events: Events,
    ):
        self.config, self.prepared, self.run = prepared.config, prepared, run
        self.display, self.checkpoints, self.signals, self.events = display, checkpoints, signals, events
        self.optimizer = make_optimizer(self.config)
        self.programs = StepPrograms(self.config, self.optimizer)
        self.evaluation_step = make_evaluation_step(self.config)
        alive, tasks = partial(reset_watchdog, self.config), prepared.tasks
        self.on_tasks = tasks.of_model(self.config, prepared.tokenizer, alive) if tasks else None
        self.agreement, self.rate = Agreement(), Rate()
        self.restore()
        self.ledger = Ledger(run.recovery, self.config.recovery, self.step)

    def restore(self) -> None:
        """What this start begins with, and what it goes back to."""
        self.begun = begun = find_starting_point(self.prepared, self.run, self.checkpoints, self.optimizer)
        self.prepared, self.state, self.positions = begun.prepared, begun.state, begun.positions
        self.step, self.judge = int(self.state["step"]), SpikeDetector(self.config.recovery, begun.history)
        self.some_held_out = first_of_each_corpus(self.prepared.held_out, self.config.evaluation.loop_bytes)

    def to_the_end(self) -> None:
        """Train, going back where a step stands out. Raises as `train` does, but for Anomaly."""
        peak, source = peak_flops(self.config.model.compute_dtype)
        self.peak_share = flops_per_token(self.config.model, self.config.data.segment_length) / peak
        for line in opening_lines(self.prepared, self.step, source):
            self.display.say(line)
        while found := self.anomaly_of_training():
            self.heal(found)
        if self.ledger.skipped:
            self.display.say(f"batches left out in all: {len(self.ledger.skipped)} (recovery.jsonl)")
        if self.prepared.mixture.skipped:
            self.display.say(f"{self.prepared.mixture.skipped} documents could not be read and were left out")

    def anomaly_of_training(self) -> Anomaly | None:
        """Train until a step stands out, which is returned, or to the end."""
        try:
            self.train()
        except Anomaly as anomaly:
            # Not the traceback, which would hold the loader.
            return Anomaly(anomaly.step, anomaly.problem)
        return None

    def heal(self, anomaly: Anomaly) -> None:
        """Back to the last save, to try its steps again or to leave rows out. InputError where too many would be."""
        reset_watchdog(self.config)
        self.events.account.turn_to("checkpoint")
        self.events.account.lose()
        self.state = {}  # Its memory is needed.
        self.checkpoints.wait()
        self.restore()
        action = self.ledger.decide(anomaly, self.step)
        self.events.write("rollback", step=anomaly.step, to=self.step, problem=anomaly.problem, action=action)
        what = "to leave its rows out" if action == SKIP else "to try its rows again"
        self.display.say(f"{anomaly}; back to step {self.step}, {what}")

    def train(self) -> None:
        """The loop: from `state` and the data at `positions` to the state after the last step.

        Raises:
            Stopped: a process of the run has had a signal; the state is saved.
            Anomaly: a step stands out; `state` and `positions` are of no use.
        """
        config, events, programs = self.config, self.events, self.programs
        last_step, stops = config.train.num_steps, False
        with ExitStack() as stack:
            loader = stack.enter_context(self.loader())
            self.logs: tuple[StepLog, StepLog] | None = None
            if jax.process_index() == 0:
                writers = open_writers(config, self.run, self.step)
                # The data may go on elsewhere than before, so the step that it goes on from is logged anew.
                self.logs = StepLog(self.run.metrics, self.step, writers), StepLog(self.run.positions, self.step - 1)
                for log in self.logs:
                    stack.callback(log.close)
            self.log_positions(self.positions.tolist())
            profiler = Profiler(self.run.profile, config.train.profile_steps, self.step)
            stack.callback(profiler.stop)
            self.rate.start()
            self.rows_left = sum(batch_size(config, s) for s in range(self.step, last_step))
            # Of these nothing has been said yet: never more than two, so that the devices always have work while the
            # host writes down what they did before.
            underway: collections.deque[Underway] = collections.deque()
            self.signals.noted = True
            begins = True

            while self.step < last_step and not stops:
                reset_watchdog(config)
                begun = time.perf_counter()
                events.account.turn_to("data")
                loaded = next(loader)
                events.account.turn_to("steps")
                self.report_skipped(loaded, self.step + 1)
                if begins and corpus_has_ended(loaded.streams_left_in, self.prepared.mixture):
                    # All that was left has been left out.
                    break
                begins = False
                waited = time.perf_counter() - begun
                batch, self.positions, left = loaded.batch, loaded.positions, loaded.streams_left_after
                self.step += 1
                step = self.step
                if corpus_has_ended(left, self.prepared.mixture):
                    last_step = step
                if not programs.has(step):
                    # Nothing is underway, so that no step's time has this in it.
                    events.account.turn_to("compile")
                    programs.compiled(step, self.state, batch)
                    events.account.turn_to("steps")
                    self.rate.start()
                    begun = time.perf_counter() - waited
                if step == profiler.first:
                    profiler.start(programs.compiled(step, self.state, batch), self.state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self.state, metrics = programs(step, self.state, batch)
                says = [self.signals.asked, waited, time.perf_counter() - begun]
                said = self.agreement.send(says, [metrics["loss"], metrics["grad_norm"]])
                underway.append(Underway(step, metrics, said))

                saves = step == last_step or step % config.checkpoint.every_steps == 0
                evaluates = any(self.evaluates(step, last_step))
                pauses = saves or evaluates or step == profiler.last or not programs.has(step + 1)
                while len(underway) > (0 if pauses or stops else 1):
                    record, asked = self.finished(underway.popleft())
                    stops = stops or (asked and step < last_step)
                    if step == profiler.last and not underway:
                        profiler.stop(self.display.say)
                        self.rate.start()
                    if evaluates and not underway and not stops:
                        record |= self.evaluated(last_step)
                    if self.logs:
                        self.logs[0].write(record)
                if saves or stops:
                    self.save(corpus_has_ended(left, self.prepared.mixture))
                elif step % config.data.positions_every_steps == 0:
                    self.log_positions(gather_positions(self.positions).tolist())
        if stops:
            events.account.turn_to("checkpoint")
            self.checkpoints.wait()
            events.write("stop", step=self.step)
            raise Stopped(self.step)

    def loader(self) -> Loader:
        """The batches from here on."""
        config = self.config
        return Loader(
            self.prepared.mixture,
            self.prepared.tokenizer,
            config.data,
            config.train.seed,
            (batch_size(config, s) for s in itertools.count(self.step)),
            batch_sharding(jax.sharding.get_mesh(), training_layout(config.mesh)),
            self.positions,
            self.step,
            self.ledger.skips,
        )

    def report_skipped(self, loaded: LoadedBatch, step: int) -> None:
        """Write down the rows that were left out before this step's, with their documents."""
        if not (batches := self.ledger.skips.get(step - 1, 0)):
            return
        rows = sorted(
            (row for of_process in all_gather_json(loaded.skipped) for row in of_process),
            key=lambda row: (row["batch"], row["row"]),
        )
        # Processes that share a row each tell of it.
        rows = [row for row, _ in itertools.groupby(rows)]
        self.events.write("skip", step=step, batches=batches, rows=rows)
        self.display.say(f"step {step}: {len(rows)} rows were left out before it")

    def evaluates(self, step: int, last_step: int) -> tuple[bool, bool]:
        """Whether evaluations on held-out text and on tasks come after a step.

        The first do at once: what is wrong with them should show.
        """
        settings, is_end = self.config.evaluation, step in (1, last_step)
        return (
            bool(self.some_held_out) and (is_end or step % settings.every_steps == 0),
            self.on_tasks is not None and (is_end or step % settings.tasks_every_steps == 0),
        )

    def finished(self, done: Underway) -> tuple[dict[str, Any], bool]:
        """(what metrics.jsonl has of a step, whether a process has been asked to stop), once the devices have done it.

        Raises:
            Anomaly: it stands out.
        """
        config, step = self.config, done.step
        metrics: dict[str, Any] = jax.tree.map(lambda x: x.tolist(), jax.device_get(done.metrics))
        asked, waited, busy, *seen = self.agreement.read(done.said).T
        record = {"step": step, "time": round(time.time(), 3)} | metrics
        shares = self.prepared.mixture.shares
        # What one process alone has wrong all must know; what is only unusual is judged by the figures of the first.
        figures = np.transpose(seen).tolist()
        record |= dict(zip(("loss", "grad_norm"), figures[0], strict=True))
        anew = step > 1 and shares(step - 1) != shares(step - 2)
        self.judge.check(record, figures, anew)
        self.rate.finished(record["loss_weight"])
        rows = batch_size(config, step - 1)
        self.rows_left -= rows
        record |= {
            "utilization": record["loss_weight"] / (rows * config.data.segment_length),
            "tokens_per_second": self.rate.tokens_per_second,
            "peak_share": self.rate.tokens_per_second * self.peak_share,
            "data_wait_seconds": float(waited.max()), "memory_bytes": memory_bytes(),
        }  # fmt: skip
        if len(busy) > 1:
            # The others wait for it.
            slowest = int(busy.argmax())
            record |= {
                "slowest_process": slowest, "slowest_process_seconds": float(busy[slowest]),
                "slowest_process_data_wait_seconds": float(waited[slowest]),
            }  # fmt: skip
        seconds_left = self.rate.seconds(self.rows_left * config.data.segment_length)
        self.display.step(record, seconds_left)
        if "watch" in record:
            self.display.say(f"step {step}  {compact(record['watch'])}")
        return record, bool(asked.any())

    def evaluated(self, last_step: int) -> dict[str, Any]:
        """What the evaluations find that are due: on all held-out documents or on some, with a sample; on tasks."""
        reset_watchdog(self.config)
        self.events.account.turn_to("evaluation")
        step, weights, tokenizer, found = self.step, evaluated_weights(self.state), self.prepared.tokenizer, {}
        on_text, on_tasks = self.evaluates(step, last_step)
        if on_text:
            texts = self.prepared.held_out if step == last_step else self.some_held_out
            found = evaluation_metrics(evaluate(self.evaluation_step, weights, texts, tokenizer, self.config))
            found["sample"] = sample_text(self.config, tokenizer, weights)
        if on_tasks and self.on_tasks:
            found |= task_metrics(self.on_tasks(weights))
        self.display.evaluation({"step": step} | found)
        self.events.account.turn_to("steps")
        self.rate.start()
        return found

    def save(self, over: bool) -> None:
        """A checkpoint of the state, whose replicas are the same."""
        reset_watchdog(self.config)
        self.events.account.turn_to("checkpoint")
        begun = time.perf_counter()
        if not all(all_gather_json(bool(is_finite(self.state)))):
            raise Anomaly(self.step, "its weights or optimizer state hold what is no number")
        check_replicas(self.state)
        positions = gather_positions(self.positions).tolist()
        self.log_positions(positions)
        progress = {"positions": positions, "identity": self.prepared.identity, "is_over": over}
        self.checkpoints.save(self.state, progress | {"history": [list(pair) for pair in self.judge.history]})
        stall = round(time.perf_counter() - begun, 3)
        self.events.account.keep()
        self.ledger.saved()
        self.events.write("save", step=self.step, stall_seconds=stall)
        self.events.account.turn_to("steps")
        self.rate.start()

    def log_positions(self, positions: list[Any]) -> None:
        """Write down where the data is after this step."""
        if self.logs:
            data = data_fingerprint(self.prepared.identity)
            self.logs[1].write({"step": self.step, "data": data, "positions": positions})
