"""What a person reads of a run at its start and at its end."""

import shlex
from collections.abc import Mapping

import jax

from data.mixture import Mixture, Source, field_of
from model.kernels import choose
from model.parameters import count_parameters
from train.evaluate import gzip_bits_per_byte
from train.events import read_events
from train.goodput import goodput
from train.mesh import training_layout
from train.metrics import duration, read_steps
from train.prepare import Prepared
from train.run import Run
from train.schedule import batch_size
from train.weights import why_no_export


def opening(prepared: Prepared, step: int, peak: str) -> list[str]:
    """What will be trained, on what and with what; one line each."""
    config = prepared.config
    mesh = " × ".join(f"{axis} {size}" for axis, size in jax.sharding.get_mesh().shape.items() if size > 1)
    kernel = choose(config.model, training_layout(config.mesh), config.data.segment_length)
    first, full = (rows * config.data.segment_length for rows in (batch_size(config, 0), config.train.batch_size))
    tokens = f"{full:,} tokens each"
    if first < full:
        tokens += f", the first {config.train.batch_ramp_steps} steps on a ramp from {first:,}"
    begin = f"goes on from step {step}" if step else "starts"
    lines = [
        f"{config.train.run_dir} {begin} of {config.train.num_steps} steps, {tokens}",
        *(
            f"{field_of(source.name).removeprefix('data.')}: {source.corpus.describe()}, "
            f"fingerprint {source.corpus.fingerprint[:12]}{drawn(source, prepared.mixture)}"
            for source in prepared.mixture.sources
        ),
        f"tokenizer: {prepared.tokenizer.vocab_size:,} token ids",
        f"model: {count_parameters(config.model):,} parameters, {config.model.compute_dtype} compute",
        f"devices: {jax.device_count()} {jax.devices()[0].device_kind}{mesh and f' as {mesh}'}; "
        f"processes: {jax.process_count()}",
        f"attention: {kernel}",
        f"peak: {peak}",
    ]
    if config.train.ema_decay:
        lines.append(f"evaluated and exported: the moving average of the weights, decay {config.train.ema_decay}")
    if config.checkpoint.export and (problem := why_no_export(config.model)):
        lines.append(f"no export at the end: {problem}")
    return lines


def drawn(source: Source, mixture: Mixture) -> str:
    """How often rows are of a corpus, and how often it is read."""
    sums = [sum(other.weight(step) for other in mixture.sources) for step, _ in source.weights]
    shares = [
        f"{weight / total:.1%} of the rows" + (f" from step {step}" if step else "")
        for (step, weight), total in zip(source.weights, sums, strict=True)
    ]
    epochs = [f"the run ends after {source.config.epochs} epochs of it"] if source.config.epochs else []
    return "".join(f"; {word}" for word in ([*shares] if len(mixture.sources) > 1 else []) + epochs)


def shares(seconds: Mapping[str, float]) -> str:
    """All the time of a run, and what it went into: steps, and whatever took more than 0.5% of it."""
    whole = sum(seconds.values())
    parts = {kind: value / max(whole, 1e-9) for kind, value in seconds.items()}
    told = [f"{part:.0%} {kind}" for kind, part in parts.items() if kind == "steps" or part > 0.005]
    return f"{duration(whole)}: {', '.join(told)}"


def closing(run: Run, program: str) -> str:
    """How the run ended, and what can be done with it now; `program` is how the user calls ziggurat."""
    config, held_out = run.load_config(), run.held_out_texts()
    records = [record for _, record in read_steps(run.metrics)]
    evaluated = [record for record in records if "validation_bits_per_byte" in record]
    steps = records[-1]["step"] if records else config.train.num_steps
    lines = [f"{run.folder} is finished: {steps} steps"]
    if steps < config.train.num_steps:
        lines[0] += f" of {config.train.num_steps}, where its corpus ended"
    if records:
        rates = sorted(record["tokens_per_second"] for record in records)
        lines[0] += f", {rates[len(rates) // 2]:,.0f} tokens/s"
    if evaluated and held_out:
        bits = evaluated[-1]["validation_bits_per_byte"]
        lines.append(f"held-out text   {bits:.3f} bits a byte; gzip -9 needs {gzip_bits_per_byte(held_out):.3f}")
    if spent := goodput(read_events(run.events)):
        lines.append(f"goodput         {shares(spent)}")
    lines.append(f"checkpoints     {run.checkpoints}")
    if run.export.exists():
        lines.append(f"weights         {run.export}")
    if evaluated:
        lines += ["sample:", *("  " + line for line in evaluated[-1]["sample"].splitlines())]
    model = run.export if run.export.exists() else run.folder
    return "\n".join(
        [
            *lines,
            "to continue a prompt:",
            f"  {program} generate {shlex.quote(str(model))} --prompt={shlex.quote(config.evaluation.prompt)}",
            "to start another run:",
            f"  {program} pretrain --config=NAME --config.train.run_dir=FOLDER",
        ]
    )
