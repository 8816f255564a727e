"""The training run, told from top to bottom: prepare, restore, train, end."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.corpus import Corpus, open_corpus
from data.errors import InputError
from data.formats.stdlib import snapshot_stdlib
from data.loader import Loader, gather_positions
from data.tokenizer import Tokenizer, train_tokenizer
from model.generate import generate
from model.parameters import count_parameters
from train.checkpoint import Checkpoints
from train.config import Config, resume_differences
from train.evaluate import Evaluation, evaluate, gzip_bits_per_byte, make_evaluation_step
from train.mesh import GENERATION, batch_sharding, make_mesh
from train.metrics import Display, MetricsFile, Rate, duration, flops_per_token, peak_flops, read_metrics
from train.optimizer import make_optimizer
from train.run import Run
from train.state import abstract_state, make_state
from train.step import make_train_step
from train.weights import check_export_folder, write_huggingface

log = logging.getLogger("ziggurat")


def pretrain(config: Config) -> None:
    """Train to `train.num_steps`, from the beginning or from the newest checkpoint in `train.run_dir`.

    Raises:
        InputError: whatever the user got wrong, before any device time is spent.
    """
    run = Run(Path(config.train.run_dir))
    first = jax.process_index() == 0

    # ── What there is already ──────────────────────────────────────────────────────────────────────────────────────
    resuming = run.config_file.exists()
    if resuming:
        check_resume(config, run)
    elif run.folder.is_dir() and any(p.name not in ("corpus", "tokenizer") for p in run.folder.iterdir()):
        raise InputError(f"train.run_dir = {run.folder} holds other things than a run; name a new folder")
    if config.checkpoint.export:
        check_export_folder(run.export)
    mesh = make_mesh(config.resolved(config.tokenizer.vocab_size))

    # ── Text and tokenizer ─────────────────────────────────────────────────────────────────────────────────────────
    corpus = run_corpus(config, run)
    tokenizer = run_tokenizer(config, run, corpus)
    given = config.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise InputError(f"model.vocab_size = {given} is less than the tokenizer's {tokenizer.vocab_size} pieces")
    config = config.resolved(tokenizer.vocab_size)
    fingerprints = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    if not run.held_out.exists():
        once(lambda: run.save_held_out(held_out_texts(corpus, config.evaluation.max_bytes)))
    held_out = run.held_out_texts()
    some_held_out = up_to(held_out, config.evaluation.loop_bytes)
    once(lambda: run.save_config(config))

    with ExitStack() as stack:
        # ── Weights, or what was left of an earlier start ──────────────────────────────────────────────────────────
        stack.enter_context(jax.set_mesh(mesh))
        optimizer = make_optimizer(config)
        checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
        stack.callback(checkpoints.close)
        if restored := checkpoints.restore(abstract_state(config, optimizer)):
            state, progress = restored
            check_fingerprints(progress["fingerprints"], fingerprints, config)
            positions = np.array(progress["positions"], np.int32)
        else:
            state, positions = make_state(config, optimizer), None
        step = int(state["step"])
        if first:
            describe(config, corpus, step, mesh.shape)
        if step >= config.train.num_steps:
            finished(config, run)
            return

        # ── The loop ───────────────────────────────────────────────────────────────────────────────────────────────
        train_step = make_train_step(config, optimizer)
        evaluation_step = make_evaluation_step(config)
        loader = stack.enter_context(
            Loader(
                corpus,
                tokenizer,
                config.data,
                config.train.seed,
                config.train.batch_size,
                config.num_streams,
                batch_sharding(mesh),
                positions,
            )
        )
        metrics_file = None
        if first:
            metrics_file = MetricsFile(run.folder, step, config.train.tensorboard)
            stack.callback(metrics_file.close)
        display = Display(config.train.num_steps, config.train.log_every_steps, quiet=not first)
        stack.callback(display.close)
        batch_tokens = config.train.batch_size * config.data.segment_length
        flops, (peak, _) = flops_per_token(config.model, config.data.segment_length), peak_flops("float32")
        rate = Rate()
        rate.start()

        while step < config.train.num_steps:
            asked = time.perf_counter()
            batch, positions = next(loader)
            waited = time.perf_counter() - asked
            state, metrics = train_step(state, batch)
            step += 1
            record: dict[str, Any] = {"step": step} | {k: float(v) for k, v in jax.device_get(metrics).items()}
            rate.finished(record.pop("loss_weight"))
            record |= {"tokens_per_second": rate.tokens_per_second, "data_wait_seconds": waited}
            last = step == config.train.num_steps
            display.step(record, rate.tokens_per_second * flops / peak, (config.train.num_steps - step) * batch_tokens)

            if held_out and (last or step % config.evaluation.every_steps == 0 or step == first_evaluation(config)):
                texts = held_out if last else some_held_out
                result = evaluate(evaluation_step, state["weights"], texts, tokenizer, config)
                record |= result.metrics()
                display.say(f"step {step}: held-out {result.bits_per_byte:.4f} bits a byte ({result.loss:.4f} nats a token)")
                display.say("  " + sample_text(config, state["weights"], tokenizer).replace("\n", "\n  "))
                rate.start()
            if metrics_file:
                metrics_file.write(record)
            if last or step % config.checkpoint.every_steps == 0:
                checkpoints.save(
                    state, {"positions": gather_positions(positions).tolist(), "fingerprints": fingerprints}
                )
                rate.start()

        # ── The end ────────────────────────────────────────────────────────────────────────────────────────────────
        checkpoints.wait()
        display.close()
        if config.checkpoint.export:
            whole = multihost_utils.process_allgather(state["weights"], tiled=True)
            once(lambda: write_huggingface(run.export, config.model, whole, tokenizer, config.data.segment_length))
    if first:
        summary(config, run, held_out)
