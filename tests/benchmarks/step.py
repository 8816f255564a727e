"""The training step beside PyTorch's: tokens a second of one model, batch and optimizer on this machine.

    python -m tests.benchmarks.step --config=tiny [--config.GROUP.FIELD=VALUE ...]

The peer is Transformers' Llama with the same shapes, AdamW (fused) and clipping, eager and compiled; bfloat16 is
autocast there, and compute_dtype here. Each contestant has a process of its own (PyTorch's threads slow JAX's in the
same one), their rounds take turns, and each figure is the median of its rounds. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.presets import add_config_arguments, load_config
from model.interchange import llama
from train.config import Config
from train.mesh import batch_sharding, make_mesh
from train.optimizer import make_optimizer
from train.state import make_state
from train.step import make_train_step

ROUNDS, STEPS = 5, 5
DTYPES = ("float32", "bfloat16")
KINDS = ("ziggurat", "torch eager", "torch compiled")


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """One document a row: neither side masks anything but the future."""
    B, T = config.train.batch_size, config.data.segment_length
    random = np.random.default_rng(0)
    tokens = random.integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segment_ids": np.ones((B, T), np.int32),
        "loss_weights": np.ones((B, T), np.float32),
    }


def ours(config: Config) -> Callable[[], float]:
    """A function that trains STEPS steps and returns the last loss, when they are finished."""
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state, step = make_state(config, optimizer), make_train_step(config, optimizer)
        batch = jax.device_put(batch_of(config), batch_sharding(mesh))

    def steps() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            jax.block_until_ready(state)
            return float(metrics["loss"])

    return steps


def theirs(config: Config, compiled: bool) -> Callable[[], float]:
    """The same with PyTorch."""
    import torch
    import transformers

    shape = llama.config_to_theirs(config.model, config.data.segment_length, eos_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = {name: torch.tensor(array, dtype=torch.long) for name, array in batch_of(config).items()}
    bfloat16 = config.model.compute_dtype == "bfloat16"

    def loss_of() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(batch["tokens"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def steps() -> float:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = forward()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return steps


def compete(kind: str, config: Config) -> None:
    """A contestant's process: a round for each line on standard input, answered by the seconds of one step."""
    steps = ours(config) if kind == "ziggurat" else theirs(config, compiled=kind == "torch compiled")
    for _ in sys.stdin:
        start = time.perf_counter()
        assert np.isfinite(steps())
        print((time.perf_counter() - start) / STEPS, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--contestant", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides).resolved(4096)
    if arguments.contestant:
        return compete(arguments.contestant, config)
    processes = {}
    for dtype in DTYPES:
        for kind in KINDS:
            flags = [*sys.argv[1:], f"--config.model.compute_dtype={dtype}", f"--contestant={kind}"]
            command = [sys.executable, "-m", "tests.benchmarks.step", *flags]
            processes[f"{kind} {dtype}"] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for _ in range(ROUNDS + 1):
        for name, process in processes.items():
            process.stdin.write("round\n")
            seconds[name].append(float(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    tokens = config.train.batch_size * config.data.segment_length
    # The first round compiles.
    rates = {name: tokens / statistics.median(found[1:]) for name, found in seconds.items()}
    for name, rate in rates.items():
        dtype = name.split()[-1]
        best = max(rates[f"torch {kind} {dtype}"] for kind in ("eager", "compiled"))
        print(f"{name:24} {rate:8,.0f} tokens/s   {rate / best:.2f} of the faster torch {dtype}")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
