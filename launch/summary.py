"""The lines that `ziggurat pretrain` prints at the end of a finished run."""

import shlex

from train.evaluation.held_out import gzip_bits_per_byte
from train.planning.data_estimate import WHOLE_RUN, has_end
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
    if records and steps < WHOLE_RUN * config.train.num_steps and has_end(config.optimizer):
        rate_left = records[-1]["learning_rate"] / config.optimizer.learning_rate
        lines.append(
            f"learning rate   still {rate_left:.0%} of its peak; a run of --config.train.num_steps={steps} lets it fall"
        )
    if evaluated and held_out:
        bits = held_out_figure(evaluated[-1], "bits_per_byte")
        lines.append(f"held-out text   {bits:.3f} bits a byte; gzip -9 needs {gzip_bits_per_byte(held_out):.3f}")
    if empty := sum(record["loss"] is None for record in records):
        lines.append(f"no token         trained on in {empty:,} steps: prompts are longer than a row")
    if spent := goodput(read_events(run.events)):
        lines.append(f"goodput         {shares(spent)}")
    lines.append(f"checkpoints     {run.checkpoints}")
    if run.export.exists():
        lines.append(f"weights         {run.export}")
    if evaluated:
        lines += ["sample:", *("  " + line for line in evaluated[-1]["sample"].splitlines())]
    model = run.export if run.export.exists() else run.folder
    lines += [
        "to continue a prompt:",
        f"  {program} generate {shlex.quote(str(model))} --prompt={shlex.quote(config.evaluation.prompt)}",
        "to start another run:",
        f"  {program} pretrain --config=NAME --config.train.run_dir=FOLDER",
    ]
    return "\n".join(lines)
