"""The training step beside PyTorch's: tokens a second of one model, batch and optimizer on this machine.

    python -m tests.benchmarks.step --config=tiny [--config.GROUP.FIELD=VALUE ...]

The peer is Transformers' Llama with the same shapes, AdamW (fused) and clipping, eager and compiled; bfloat16 is
autocast there, and compute_dtype here. Rounds of all are interleaved, and each figure is the median of its rounds. The
last line is one JSON object.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

from launch.presets import add_config_arguments, load_config
from model.interchange import llama
from train.config import Config
from train.mesh import batch_sharding, make_mesh
from train.optimizer import make_optimizer
from train.state import make_state
from train.step import make_train_step

ROUNDS, STEPS = 5, 5
DTYPES = ("float32", "bfloat16")


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
    shape = llama.config_to_theirs(config.model, config.data.segment_length, eos_id=0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batch = {name: torch.tensor(array, dtype=torch.long) for name, array in batch_of(config).items()}
    bfloat16 = config.model.compute_dtype == "bfloat16"

    def loss_of() -> torch.Tensor:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    base = load_config(arguments.config, arguments.overrides).resolved(4096)
    contestants = {}
    for dtype in DTYPES:
        config = dataclasses.replace(base, model=dataclasses.replace(base.model, compute_dtype=dtype))
        contestants[f"ziggurat {dtype}"] = ours(config)
        for compiled in (False, True):
            contestants[f"torch {dtype} {'compiled' if compiled else 'eager'}"] = theirs(config, compiled)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(ROUNDS + 1):
        for name, steps in contestants.items():
            start = time.perf_counter()
            assert np.isfinite(steps()), name
            if round_number:  # the first compiles
                seconds[name].append((time.perf_counter() - start) / STEPS)
    tokens = base.train.batch_size * base.data.segment_length
    rates = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    for name, rate in rates.items():
        dtype = name.split()[1]
        best = max(rates[f"torch {dtype} {kind}"] for kind in ("eager", "compiled"))
        print(f"{name:26} {rate:8,.0f} tokens/s   {rate / best:.2f} of the faster torch {dtype}")
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
