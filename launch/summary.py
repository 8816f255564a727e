"""The lines that `ziggurat pretrain` prints at the end of a finished run."""

import shlex
from collections.abc import Mapping
from typing import Any

from train.config.optimizer_config import OptimizerConfig
from train.evaluation.held_out import gzip_bits_per_byte
from train.planning.data_estimate import WHOLE_RUN, has_end, rate_has_end
from train.run.events import read_events
from train.run.folder import Run
from train.run.goodput import goodput, shares
from train.run.step_log import held_out_figure, median_rate, read_metrics


def summary(run: Run, program: str) -> str:
    """Returns the results of a run and the commands that use it; `program` is how the user calls ziggurat."""
    config, held_out = run.load_config(), run.held_out_texts()
    records = read_metrics(run.metrics)
    evaluated = [record for record in records if "validation_bits_per_byte" in record]
    steps = records[-1]["step"] if records else config.train.num_steps
    first = f"{run.folder} is finished: {steps} steps"
    if steps < config.train.num_steps:
        first += f" of {config.train.num_steps}, where its corpus ended"
    if records:
        rate = median_rate(records)
        first += f", {rate:,.0f} tokens/s"
    lines = [first]
    if records and steps < WHOLE_RUN * config.train.num_steps and has_end(config.resolved()):
        left = schedule_left(config.optimizer, records[-1])
        lines.append(f"{left}; a run of --config.train.num_steps={steps} lets it fall")
    if evaluated and held_out:
        bits = held_out_figure(evaluated[-1], "bits_per_byte")
        lines.append(f"held-out text   {bits:.3f} bits a byte; gzip -9 needs {gzip_bits_per_byte(held_out):.3f}")
    if compared := [record for record in records if "validation_preference_accuracy" in record]:
        accuracy, pairs = (held_out_figure(compared[-1], name) for name in ("preference_accuracy", "pairs"))
        lines.append(f"held-out pairs  {accuracy:.1%} of {pairs:,.0f} in the right order")
    if empty := sum(record["loss"] is None for record in records):
        lines.append(f"no token         trained on in {empty:,} steps: prompts are longer than a row")
    if spent := goodput(read_events(run.events)):
        lines.append(f"goodput         {shares(spent)}")
    lines.append(f"checkpoints     {run.checkpoints}")
    if run.export.exists():
        lines.append(f"weights         {run.export}")
    if evaluated and held_out:
        lines += what_it_learned(evaluated[-1], gzip_bits_per_byte(held_out), config.resolved().model.vocab_size)
    if evaluated and evaluated[-1]["sample"]:
        lines += ["sample:", *("  " + line for line in evaluated[-1]["sample"].splitlines())]
    model = shlex.quote(str(run.export if run.export.exists() else run.folder))
    folder = shlex.quote(str(run.folder))
    if not config.model.reward_head:
        prompt = shlex.quote(config.evaluation.prompt)
        lines += ["to continue a prompt:", f"  {program} generate {model} --prompt={prompt}"]
    lines += [
        "to see the run as a page:",
        f"  {program} report {folder}",
        "to train the same model on your own text, a file or a folder:",
        f"  {program} pretrain --config={folder} --config.data.corpus=TEXT --config.train.run_dir=FOLDER",
        "to see what a model with twice the layers takes on this machine:",
        f"  {program} plan --config={folder} --config.model.num_layers={2 * config.model.num_layers}",
    ]
    return "\n".join(lines)


def schedule_left(c: OptimizerConfig, last: Mapping[str, Any]) -> str:
    """Returns what the `last` record of a run leaves of its schedule, or says that those of some parameters go on."""
    if not rate_has_end(c):
        return "schedule        the rate or decay of some parameters has not come to its end"
    return f"learning rate   still {last['learning_rate'] / c.learning_rate:.0%} of its peak"


def what_it_learned(evaluated: Mapping[str, Any], gzip_bits: float, vocab_size: int) -> list[str]:
    """Returns the figures of the last evaluation in plain words."""
    bits = held_out_figure(evaluated, "bits_per_byte")
    verdict = "it knows such text better than that compressor does"
    if bits >= gzip_bits:
        verdict = "the compressor still does better, so it needs more steps or more text"
    lines = [
        "what it learned, measured on text that it was not trained on:",
        f"  with its predictions a byte takes {bits:.2f} bits instead of 8 (gzip -9: {gzip_bits:.2f});",
        f"  {verdict}",
    ]
    if "validation_accuracy" in evaluated:
        accuracy, tokens = (held_out_figure(evaluated, name) for name in ("accuracy", "tokens"))
        lines.append(
            f"  its first guess, out of {vocab_size:,} tokens, was right in {accuracy:.0%} of {tokens:,.0f} places"
        )
    return lines
