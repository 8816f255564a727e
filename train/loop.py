"""The training run as a story: prepare, restore, train, recover, end."""

import faulthandler
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from data.errors import StorageError
from data.loader import LoadedBatch, Loader, corpus_has_ended, gather_positions, look_ahead
from data.mixture import Mixture
from train.checkpoint.checkpoint import Checkpoints
from train.config.config import Config
from train.data_identity import RunInputs, data_fingerprint, first_step
from train.devices.agreement import Agreement
from train.devices.collectives import all_gather_json, on_first_process
from train.devices.mesh import batch_sharding, make_mesh
from train.devices.rules import training_layout
from train.display import Display, opening_lines
from train.evaluations import Evaluations
from train.in_flight import InFlight
from train.planning.data_estimate import DataEstimate, estimate_data
from train.prepare import leaving_no_copy, prepare_run
from train.profiling import Profiler
from train.run.events import Events, start_fields
from train.run.folder import Run
from train.run.lease import Lease
from train.run.ledger import SKIP, Ledger
from train.run.step_log import StepLog, read_metrics
from train.run.storage import storage_errors
from train.run.trackers import open_writers
from train.saving import Saver
from train.starting_point import StartingPoint, find_starting_point
from train.step.compile_ahead import CompileAhead
from train.step.flops import flops_per_token, peak_flops
from train.step.optimizer import make_optimizer
from train.step.schedule import rows_read
from train.step.spike_detector import Anomaly, SpikeDetector
from train.step.state import State
from train.step.step import StepPrograms
from train.step.watch import compact
from train.stop import Stopped, StopSignals, reset_watchdog
from train.weights.huggingface import check_export_folder, exported_step, why_no_export
from train.weights.load import export_run

# Bytes of text from which the size of a tokenizer is likely what was asked for, and its training takes a while.
MUCH_TEXT = 2**20


def pretrain(config: Config) -> Run:
    """Trains to `train.num_steps` or to the end of `data.epochs`, from the newest checkpoint in `train.run_dir` if any.

    All processes call this together.

    Raises:
        InputError: the user's mistakes, before any device time is spent; or too many batches would be skipped.
        Stopped: a signal asked the run to end early; its state is saved.
    """
    run = Run.from_config(config)
    events = Events(run.events if jax.process_index() == 0 else None, config.train.on_event)
    exports = config.checkpoint.export and why_no_export(config.model) is None
    if exports:
        check_export_folder(run.export)
    asked = config.resolved(config.tokenizer.vocab_size)
    mesh = make_mesh(asked)
    programs, ahead = StepPrograms(asked, make_optimizer(asked)), CompileAhead(mesh)

    with ExitStack() as stack:
        # ── Prepare: the run's folder, corpus, tokenizer and held-out documents ──
        quiet = jax.process_index() > 0
        display = Display(config.train.num_steps, config.train.log_every_steps, quiet, lambda: events.account.activity)
        stack.callback(display.close)
        signals = stack.enter_context(StopSignals(display.say))
        stack.enter_context(leaving_no_copy(run))
        lease = Lease(run.lease)
        stack.callback(lease.release)
        inputs = prepare_run(config, run, lease, lambda mixture: compile_first_step(ahead, programs, mixture))
        stack.enter_context(jax.set_mesh(mesh))
        stack.callback(events.close)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        events.note_crash(lease.last_beat)

        # ── Restore: the newest checkpoint, or a first state ──
        checkpoints = Checkpoints(run.checkpoints, inputs.config.checkpoint)
        stack.callback(checkpoints.close)
        training = Training(run, inputs, display, checkpoints, signals, events, programs, ahead)
        on_first_process(lambda: run.save_config(inputs.config))

        # ── Train ──
        first_step = training.step
        if first_step < inputs.config.train.num_steps and not training.start.is_over:
            fields = start_fields(inputs.config, data_fingerprint(inputs.identity))
            events.write("start", step=first_step, **training.start.fields, **fields)
            with noting_faults(events, checkpoints):
                training.run_to_end()
                events.account.switch_to("checkpoint")
                checkpoints.wait()
                signals.noted = False

        # ── End: the weights for inference, read from the checkpoint ──
        if exports and (first_step < training.step or exported_step(run.export) != training.step):
            with storage_errors("the export", run.export):
                on_first_process(lambda: export_run(run, inputs.config, checkpoints, inputs.tokenizer, training.step))
        if first_step < training.step:
            events.write("end", step=training.step)
    return run


def compile_first_step(ahead: CompileAhead, programs: StepPrograms, mixture: Mixture) -> None:
    """Begins to compile the first step while a tokenizer is trained on much text.

    The program is wasted if the tokenizer has another size than the config asks for, as it has with little text.
    """
    config = programs.config
    trains_tokenizer = config.tokenizer.path is None and config.train.init_from is None
    if trains_tokenizer and sum(source.corpus.size for source in mixture.sources) >= MUCH_TEXT:
        ahead.begin(lambda: programs.compile_ahead(1))


@contextmanager
def noting_faults(events: Events, checkpoints: Checkpoints) -> Iterator[None]:
    """Writes a `fault` event for any error but `Stopped`, finishes the save that is under way, and raises the error."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        with suppress(StorageError):
            events.write("fault", error=f"{type(error).__name__}: {error}")
        with suppress(StorageError):
            # The state that is being written is good, whatever has happened since.
            checkpoints.wait()
        raise


@dataclass
class Training:
    """One start of a run: it trains from a restored step, and after a spike again from the last save.

    Attributes:
        inputs: the run's inputs, with the held-out documents of the restored data.
        start: the starting point of this start, or of the last rollback.
        state: the state of training after `step` steps.
        step: number of steps that are done.
        positions: positions in the data after `step` steps, of the streams that this process reads.
        programs: the programs of the steps, made again if they are for another config.
        ahead: compiles programs while this thread restores or makes the state.
    """

    run: Run
    inputs: RunInputs
    display: Display
    checkpoints: Checkpoints
    signals: StopSignals
    events: Events
    programs: StepPrograms
    ahead: CompileAhead

    def __post_init__(self) -> None:
        self.config = self.inputs.config
        self.optimizer = make_optimizer(self.config)
        if self.programs.config != self.config:
            self.programs = StepPrograms(self.config, self.optimizer)
        saved = self.run.last_step() or 0
        if saved < self.config.train.num_steps:
            self.ahead.begin(lambda: self.programs.compile_ahead(saved + 1))
        self.evaluations = Evaluations(self.inputs)
        self.agreement = Agreement()
        self.restore()
        self.ledger = Ledger(self.run.recovery, self.config.recovery, self.step)

    def restore(self) -> None:
        """Restores the newest checkpoint, or makes a first state."""
        self.state: State = {}  # frees its memory before the restore
        self.start: StartingPoint = find_starting_point(self.inputs, self.run, self.checkpoints, self.optimizer)
        self.inputs = self.start.inputs
        self.state = self.start.state
        self.step = int(self.state["step"])
        self.positions: np.ndarray = self.start.positions
        self.evaluations.use(self.inputs.held_out)

    def run_to_end(self) -> None:
        """Trains to the last step, with a rollback after each spike. Raises as `train` does, except for Anomaly."""
        peak, source = peak_flops(self.config.model.compute_dtype)
        # The share of the devices' peak that one token a second is.
        self.flops_share = flops_per_token(self.config.model, self.config.data.segment_length) / peak
        self.ahead.begin(self.evaluations.compile)
        estimate = DataEstimate({}, self.config.train.num_steps)
        if jax.process_index() == 0:  # which alone shows it
            begin = first_step(self.config)
            estimate = estimate_data(self.config, self.inputs.mixture, self.inputs.tokenizer, begin)
        self.expected_end = estimate.last_step
        for line in opening_lines(self.inputs, estimate, self.step, source):
            self.display.say(line)
        self.display.begin(self.step, partial(self.draw_past, self.step))
        while True:
            try:
                self.train()
                break
            except Anomaly as error:
                anomaly = error.with_traceback(None)  # it would keep the loader alive
            self.roll_back(anomaly)
        if self.ledger.skipped:
            self.display.say(f"batches skipped in all: {len(self.ledger.skipped)} (recovery.jsonl)")
        if num_skipped := self.inputs.mixture.skipped:
            self.display.say(f"{num_skipped} documents could not be read and were skipped")

    def draw_past(self, step: int) -> None:
        """Adds to the display's curve what it is compared with, and the steps up to `step`, from before this start."""
        self.display.curve.levels = self.evaluations.references()
        for record in read_metrics(self.run.metrics):
            if record["step"] <= step:
                self.display.curve.add(record)

    def roll_back(self, anomaly: Anomaly) -> None:
        """Restores the last save, to try the same rows again or to skip them. InputError if the budget is spent."""
        reset_watchdog(self.config)
        self.events.account.switch_to("checkpoint")
        self.events.account.discard_unsaved()
        self.checkpoints.wait()
        self.restore()
        action = self.ledger.decide(anomaly, self.step)
        self.events.write("rollback", step=anomaly.step, to=self.step, problem=anomaly.problem, action=action)
        purpose = "to skip its rows" if action == SKIP else "to try its rows again"
        self.display.say(f"{anomaly}; back to step {self.step}, {purpose}")

    def train(self) -> None:
        """The loop: trains from `state` and `positions` to the last step.

        Raises:
            Stopped: a process of the run was asked to stop; the state is saved.
            Anomaly: a step has a spike; `state` and `positions` cannot be used any more.
        """
        config = self.config
        mixture = self.inputs.mixture
        begun_at = self.step
        last_step = config.train.num_steps
        detector = SpikeDetector(config.recovery, self.start.history)
        with ExitStack() as stack:
            loader = stack.enter_context(self.open_loader())
            step_log, position_log, sample_log = self.open_logs(stack)
            identity = self.inputs.identity
            saver = Saver(self.checkpoints, self.events, self.ledger, detector, identity, position_log, step_log)
            saver.log_positions(self.step, self.positions.tolist())
            profiler = Profiler(self.run.profile, config.train.profile_steps, self.step)
            stack.callback(profiler.stop)
            in_flight = InFlight(self.inputs, self.agreement, detector, self.step, self.expected_end, self.flops_share)
            self.signals.noted = True
            stop_asked = False

            while self.step < last_step and not stop_asked:
                # ── Read the next batch ──
                loaded, waited = self.next_batch(loader)
                if self.step == begun_at and corpus_has_ended(loaded.streams_left_in, mixture):
                    break  # all remaining rows were skipped
                self.step += 1
                self.positions = loaded.positions
                is_over, is_empty = look_ahead(loaded, mixture)
                if is_over:
                    last_step = self.step

                # ── Sample answers to its prompts, if that is the objective ──
                if self.inputs.rollouts and not is_empty:
                    loaded, is_empty = self.inputs.rollouts.answered(self.step, self.state, loaded, sample_log)

                # ── Dispatch its step, without waiting for the devices ──
                self.dispatch(loaded, is_empty, waited, in_flight, profiler)

                # ── Log the steps that are done: all of them before a pause, and otherwise all but this one ──
                saves = self.step == last_step or self.step % config.checkpoint.every_steps == 0
                pauses = saves or self.step == profiler.last or not self.programs.has(self.step + 1)
                stop_asked = self.log_finished(in_flight, pauses, last_step, profiler, step_log)

                # ── Save ──
                if saves or stop_asked:
                    reset_watchdog(config)
                    saver.save(self.step, self.state, self.positions, is_over)
                    in_flight.rate.start()
                elif self.step % config.data.positions_every_steps == 0:
                    saver.log_positions(self.step, gather_positions(self.positions).tolist())
        if stop_asked:
            self.events.account.switch_to("checkpoint")
            self.checkpoints.wait()
            self.events.write("stop", step=self.step)
            raise Stopped(self.step)

    def open_loader(self) -> Loader:
        """Opens the batches from the current step on."""
        train = self.config.train
        sharding = batch_sharding(jax.sharding.get_mesh(), training_layout(self.config.mesh))
        sizes = (rows_read(self.config, step) for step in itertools.count(self.step))
        return Loader(
            self.inputs.mixture, self.inputs.tokenizer, self.config.data, train.seed, sizes, sharding,
            self.positions, self.step, self.ledger.skips,
        )  # fmt: skip

    def open_logs(self, stack: ExitStack) -> tuple[StepLog | None, StepLog | None, StepLog | None]:
        """Opens metrics.jsonl, positions.jsonl and, for sampled answers, samples.jsonl on process 0, for the stack."""
        if jax.process_index() > 0:
            return None, None, None
        step_log = StepLog(self.run.metrics, self.step, open_writers(self.config, self.run, self.step))
        stack.callback(step_log.close)
        # The position of the current step is written again: after `data.accept_changes` it differs.
        position_log = StepLog(self.run.positions, self.step - 1)
        stack.callback(position_log.close)
        if not self.inputs.rollouts:
            return step_log, position_log, None
        sample_log = StepLog(self.run.samples, self.step)
        stack.callback(sample_log.close)
        return step_log, position_log, sample_log

    def next_batch(self, loader: Loader) -> tuple[LoadedBatch, float]:
        """Returns (the next batch, seconds that it took), and reports rows that were skipped before it."""
        reset_watchdog(self.config)
        begun = time.perf_counter()
        self.events.account.switch_to("data")
        loaded = next(loader)
        self.events.account.switch_to("steps")
        if batches := self.ledger.skips.get(self.step, 0):
            rows = itertools.chain.from_iterable(all_gather_json(loaded.skipped))
            # Processes that share a row each report it.
            unique = [row for row, _ in itertools.groupby(sorted(rows, key=lambda row: (row["batch"], row["row"])))]
            self.events.write("skip", step=self.step + 1, batches=batches, rows=unique)
            self.display.say(f"step {self.step + 1}: {len(unique)} rows were skipped before it")
        return loaded, time.perf_counter() - begun

    def dispatch(
        self, loaded: LoadedBatch, is_empty: bool, waited: float, in_flight: InFlight, profiler: Profiler
    ) -> None:
        """Gives the step to the devices, after its program was compiled. An empty batch changes no weight."""
        if not is_empty and not self.programs.has(self.step):
            # No step is in flight now, so this does not count as the time of any.
            self.events.account.switch_to("compile")
            self.programs.compiled(self.step, self.state, loaded.batch)
            self.events.account.switch_to("steps")
            in_flight.rate.start()
        begun = time.perf_counter()
        if self.step == profiler.first:
            profiler.start(self.programs.compiled(self.step, self.state, loaded.batch), self.state)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
            if is_empty:
                self.state, metrics = self.programs.skip(self.state)
            else:
                self.state, metrics = self.programs(self.step, self.state, loaded.batch)
        in_flight.add(
            self.step, metrics | loaded.figures, [self.signals.asked, waited, waited + time.perf_counter() - begun]
        )

    def evaluated_weights(self) -> Any:
        """Returns the moving average of the weights, or the weights where there is none."""
        return self.state.get("average", self.state["weights"])

    def log_finished(
        self, in_flight: InFlight, pauses: bool, last_step: int, profiler: Profiler, step_log: StepLog | None
    ) -> bool:
        """Logs the finished steps, all of them before a pause, and evaluates if it is due. True if a stop was asked."""
        evaluates = self.evaluations.are_due(self.step, last_step)
        stop_asked = False
        while len(in_flight) > (0 if pauses or evaluates or stop_asked else 1):
            record, asked = in_flight.finish_oldest()
            self.display.step(record, in_flight.seconds_left())
            if "watch" in record:
                self.display.say(f"step {record['step']}  {compact(record['watch'])}")
            stop_asked = stop_asked or (asked and self.step < last_step)
            if self.step == profiler.last and not in_flight:
                profiler.stop(self.display.say)
                in_flight.rate.start()
            if evaluates and not in_flight and not stop_asked:
                self.events.account.switch_to("compile")
                self.ahead.wait()
                self.events.account.switch_to("evaluation")
                fields = self.evaluations.run(
                    self.step, last_step, self.evaluated_weights(), self.state.get("reference")
                )
                self.display.evaluation({"step": self.step} | fields)
                self.events.account.switch_to("steps")
                in_flight.rate.start()
                record |= fields
            if step_log:
                step_log.write(record)
        return stop_asked
