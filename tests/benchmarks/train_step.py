"""The training step beside PyTorch's: tokens a second of two Llama-like models and a mixture on this machine.

    python -m tests.benchmarks.train_step [--model=33.6M] [--dtype=float32] [--turns=4]

Model, batch and optimizer (AdamW) are the same on both sides: 33.6 million parameters and 4,096 tokens a step, the
shapes of the preset `tiny`, or a small OLMoE whose tokens choose 8 of 64 experts. The peer is the plain PyTorch model
below, eager and compiled, with fused AdamW; for the mixture it is that of Transformers with the same weights, eager
with its loop over experts and compiled with its grouped products, and the first losses must agree; a fourth contestant
is our dense model of the active size. bfloat16 is autocast
there, and compute_dtype here. Each contestant has a process of its own (one library's threads slow the
other's in the same one) with the same memory settings; they take turns, and each figure is the median of a
contestant's steps. The first step of a turn does not count: while the others had theirs, the machine may have taken
memory back. A side's peak is the best matrix product that its own library does in that dtype. "cores" are those a
contestant had on average: CPU seconds of a step by its seconds. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.configs import tiny
from launch.doctor import processor
from launch.memory import memory_for
from train.config.config import Config
from train.config.reading import make_config

DTYPES = ("float32", "bfloat16")
SIDES = ("ziggurat", "torch eager", "torch compiled")
DENSE = "ziggurat dense"
# Rows, summed, columns: square, and the products of a feed-forward layer of the model below.
PEAK_SHAPES = ((2048, 2048, 2048), (4096, 512, 2048), (4096, 2048, 512))
TURNS, STEPS, PEAK_REPEATS = 4, 3, 3
MODELS = ("33.6M", "tiny", "mixture")
# Relative distance of the first losses of two sides with the same weights.
SAME_LOSS = {"float32": 1e-5, "bfloat16": 3e-3}


def config_of(model: str, dtype: str, side: str = "ziggurat") -> Config:
    """What a side trains."""
    if model == "tiny":
        preset = tiny.get_config().to_dict()
        # The other side has no norm of queries and keys.
        shapes = {"vocab_size": 4096} | preset["model"] | {"qk_norm": False}
        segment_length, batch_size = preset["data"].get("segment_length", 256), preset["train"]["batch_size"]
    elif model == "mixture":
        shapes = {"model_dim": 512, "num_layers": 4, "num_heads": 8, "vocab_size": 8192, "feedforward_dim": 192}
        shapes |= {"qk_norm": True, "qk_norm_over": "all_heads", "tie_embeddings": False}
        experts = {"num_experts": 64, "experts_per_token": 8, "router_normalize": False}
        shapes |= {"feedforward_dim": 8 * 192} if side == DENSE else experts
        segment_length, batch_size = 512, 8
    else:
        shapes = {"model_dim": 512, "num_layers": 6, "num_heads": 8, "feedforward_dim": 2048, "vocab_size": 8192}
        segment_length, batch_size = 512, 8
    return make_config(
        {
            "model": shapes | {"compute_dtype": dtype},
            "data": {"segment_length": segment_length},
            "train": {"batch_size": batch_size},
            "optimizer": {"clip_norm": 0.0},
        }
    ).resolved()


def batch_of(config: Config) -> dict[str, np.ndarray]:
    """One document a row: neither side masks anything but the future."""
    B, T = config.train.batch_size, config.data.segment_length
    assert config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segment_ids": np.ones((B, T), np.int32),
        "loss_weights": np.ones((B, T), np.float32),
    }


def best_rate(multiply: Callable[[int, int, int], Callable[[], Any]]) -> float:
    """FLOP/s of the best matrix product; `multiply` gives the function that computes one of (rows, summed, columns)."""
    rates = []
    for shape in PEAK_SHAPES:
        product = multiply(*shape)
        for _ in range(PEAK_REPEATS):
            start = time.perf_counter()
            product()
            rates.append(2 * np.prod(shape, dtype=float) / (time.perf_counter() - start))
    return max(rates)


# ── Ziggurat ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ziggurat(config: Config) -> tuple[Callable[[], float], Callable[[], float]]:
    """(train one step and return its loss when it is finished, measure the peak)."""
    import jax
    import jax.numpy as jnp

    from train.devices.mesh import batch_sharding, one_device_mesh
    from train.step.optimizer import make_optimizer
    from train.step.state import make_state
    from train.step.step import make_train_step

    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state, train_step = make_state(config, optimizer), make_train_step(config, optimizer)
        batch = jax.device_put(batch_of(config), batch_sharding(mesh))

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch)
            jax.block_until_ready(state)
            return float(metrics["loss"])

    matmul = jax.jit(partial(jnp.matmul, preferred_element_type=jnp.float32))

    def multiply(rows: int, summed: int, columns: int) -> Callable[[], Any]:
        a, b = (jnp.ones(shape, config.model.compute_dtype) for shape in ((rows, summed), (summed, columns)))
        return lambda: matmul(a, b).block_until_ready()

    return step, lambda: best_rate(multiply)


# ── PyTorch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pytorch(config: Config, compiled: bool, folder: Path | None) -> tuple[Callable[[], float], Callable[[], float]]:
    """The same of PyTorch, with the weights in the folder if there is one."""
    import torch
    from torch.nn import functional

    m = config.model
    model = transformers_model(folder, compiled) if folder else plain_model(config)
    c = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), c.learning_rate, (c.beta1, c.beta2), c.epsilon, c.weight_decay, fused=True
    )
    batch = {name: torch.tensor(array, dtype=torch.long) for name, array in batch_of(config).items()}
    dtype = getattr(torch, m.compute_dtype)

    def loss_of() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(batch["tokens"])
        logits = logits.logits if folder else logits
        return functional.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.item()

    def multiply(rows: int, summed: int, columns: int) -> Callable[[], Any]:
        a, b = torch.ones(rows, summed, dtype=dtype), torch.ones(summed, columns, dtype=dtype)
        return lambda: a @ b

    return step, lambda: best_rate(multiply)


def transformers_model(folder: Path, compiled: bool) -> Any:
    """The model of the folder, with the form of its experts that is faster eager, or compiled."""
    import torch
    import transformers

    experts = "grouped_mm" if compiled else "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation=experts, use_cache=False
    )


def plain_model(config: Config) -> Any:
    """The Llama-like model."""
    import torch
    from torch import nn
    from torch.nn import functional

    m, T = config.model, config.data.segment_length
    assert m.head_dim
    assert m.num_kv_heads
    assert m.feedforward_dim
    assert m.vocab_size
    frequencies = m.rope_base ** (-torch.arange(0, m.head_dim, 2) / m.head_dim)
    angles = torch.outer(torch.arange(T), frequencies)
    cosine, sine = angles.cos(), angles.sin()

    def rotate(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.RMSNorm(m.model_dim, eps=m.norm_epsilon) for _ in range(2))
            self.query, self.output = (nn.Linear(m.model_dim, m.model_dim, bias=False) for _ in range(2))
            self.key, self.value = (nn.Linear(m.model_dim, m.num_kv_heads * m.head_dim, bias=False) for _ in range(2))
            self.gate, self.up = (nn.Linear(m.model_dim, m.feedforward_dim, bias=False) for _ in range(2))
            self.down = nn.Linear(m.feedforward_dim, m.model_dim, bias=False)

        def forward(self, x: Any) -> Any:
            y = self.norms[0](x)
            q, k, v = (
                part(y).unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for part in (self.query, self.key, self.value)
            )
            y = functional.scaled_dot_product_attention(
                rotate(q), rotate(k), v, is_causal=True, enable_gqa=m.num_kv_heads < m.num_heads
            )
            x = x + self.output(y.transpose(1, 2).flatten(2))
            y = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    return nn.Sequential(
        nn.Embedding(m.vocab_size, m.model_dim),
        *(Block() for _ in range(m.num_layers)),
        nn.RMSNorm(m.model_dim, eps=m.norm_epsilon),
        nn.Linear(m.model_dim, m.vocab_size, bias=False),
    )


def write_weights(config: Config, folder: Path) -> None:
    """Writes the weights with which our side starts, as a model of Transformers."""
    import jax
    from safetensors.numpy import save_file

    from model.interchange.huggingface import Interchange
    from model.interchange.tensors import reader_of
    from model.parameters import initial_weights
    from train.devices.mesh import one_device_mesh
    from train.devices.rules import training_layout

    with jax.set_mesh(one_device_mesh()):
        layout = training_layout(config.mesh)
        weights = jax.device_get(jax.jit(lambda: initial_weights(config.model, config.train.seed, layout))())
    interchange = Interchange(config.model, config.data.segment_length)
    (folder / "config.json").write_text(json.dumps(interchange.export_config(1, 2)))
    tensors = {name: np.ascontiguousarray(x) for name, x in interchange.export_tensors(reader_of(weights))}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ── The contest ──────────────────────────────────────────────────────────────────────────────────────────────────────


def compete(side: str, config: Config, folder: Path | None) -> None:
    """A contestant's process: the first loss, then a turn for each line on standard input.

    A turn is [seconds, CPU seconds, peak FLOP/s] of each step.
    """
    step, peak = ziggurat(config) if side in ("ziggurat", DENSE) else pytorch(config, side == "torch compiled", folder)
    print(step(), flush=True)
    for _ in sys.stdin:
        step()
        turn = []
        for _ in range(STEPS):
            start, start_of_cpu = time.perf_counter(), time.process_time()
            assert np.isfinite(step())
            turn.append([time.perf_counter() - start, time.process_time() - start_of_cpu, peak()])
        print(json.dumps(turn), flush=True)


def contest(model: str, dtype: str, turns: int, folder: Path | None) -> dict[str, np.ndarray]:
    """Side → a row a counted step: seconds, CPU seconds, FLOP/s of a product."""
    environment = os.environ | {"GLIBC_TUNABLES": memory_for(config_of(model, dtype))}
    processes, losses = {}, {}
    for side in [*SIDES, DENSE] if folder else SIDES:
        command = [sys.executable, "-m", "tests.benchmarks.train_step", "--model", model, "--dtype", dtype]
        processes[side] = subprocess.Popen(
            [*command, "--side", side, *(["--weights", str(folder)] if folder else [])],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        losses[side] = float(processes[side].stdout.readline())
    of_mixtures = [loss for side, loss in losses.items() if side != DENSE]
    if folder and not np.allclose(of_mixtures, losses["ziggurat"], rtol=SAME_LOSS[dtype]):
        sys.exit(f"the first losses differ: {losses}")
    found: dict[str, list[list[list[float]]]] = {side: [] for side in processes}
    for _ in range(turns):
        for side, process in processes.items():
            assert process.stdin
            assert process.stdout
            process.stdin.write("turn\n")
            found[side].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return {side: np.concatenate(of_side) for side, of_side in found.items()}


def report(model: str, dtype: str, results: dict[str, np.ndarray]) -> dict[str, float]:
    """Prints the table of a contest and returns its figures."""
    # Imported here, so that no contestant of PyTorch has JAX's threads.
    from train.step.flops import flops_per_token

    config = config_of(model, dtype)
    tokens = config.train.batch_size * config.data.segment_length
    flops = flops_per_token(config.model, config.data.segment_length)
    medians = {side: np.median(rows, axis=0) for side, rows in results.items()}
    rates = {side: tokens / medians[side][0] for side in results}
    # A library's best, whichever of its sides had it.
    library = {side: side.split()[0] for side in results}
    peaks = {of: max(results[side][:, 2].max() for side in results if library[side] == of) for of in library.values()}
    figures: dict[str, float] = {}
    columns = ("tokens/s", "slowest", "fastest", "ours/its", "CPU s", "cores", "peak GF/s", "of peak")
    print(f"{model + ' ' + dtype:24}" + "".join(f"{column:>10}" for column in columns))
    for side in results:
        seconds, cpu_seconds, _ = medians[side]
        peak = peaks[library[side]]
        ratio, share = rates["ziggurat"] / rates[side], rates[side] * flops / peak
        slowest, fastest = tokens / results[side][:, 0].max(), tokens / results[side][:, 0].min()
        print(
            f"{side:24}{rates[side]:10,.0f}{slowest:10,.0f}{fastest:10,.0f}{ratio:10.2f}"
            f"{cpu_seconds:10.2f}{cpu_seconds / seconds:10.2f}{peak / 1e9:10,.0f}{share:10.0%}"
        )
        if side == "ziggurat":
            figures[f"peak_share_{dtype}"] = share
        else:
            kind = side.split()[1]
            figures[f"ratio_{dtype}_{kind}"] = ratio
            figures[f"cpu_ratio_{dtype}_{kind}"] = cpu_seconds / medians["ziggurat"][1]
            figures[f"peak_share_{dtype}_{kind}"] = share
        name = f"{side} {dtype}".replace(" ", "_")
        figures[f"tokens_per_second_{name}"] = rates[side]
        figures[f"peak_gflops_{name}"] = peak / 1e9
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="only this one [all]")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one [both]")
    parser.add_argument("--turns", type=int, default=TURNS, help="that count, after the first [%(default)s]")
    parser.add_argument("--side", choices=(*SIDES, DENSE), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        config = config_of(arguments.model, arguments.dtype, arguments.side)
        return compete(arguments.side, config, arguments.weights)

    # What runs on other devices is not to be compared here.
    os.environ["JAX_PLATFORMS"] = "cpu"
    cores = os.cpu_count() or 1
    figures: dict[str, Any] = {"turns": arguments.turns, "cores": cores, "processor": processor()}
    busy_cores = float(cores)
    for model in [arguments.model] if arguments.model else MODELS:
        for dtype in [arguments.dtype] if arguments.dtype else DTYPES:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) if model == "mixture" else None
                if folder:
                    write_weights(config_of(model, dtype), folder)
                results = contest(model, dtype, arguments.turns, folder)
            seconds, cpu_seconds, _ = results["torch compiled"].T
            busy_cores = min(busy_cores, float(np.median(cpu_seconds / seconds)))
            prefix = "" if model == MODELS[0] else f"{model}_"
            figures |= {f"{prefix}{name}": float(f"{x:.5g}") for name, x in report(model, dtype, results).items()}
    if busy_cores < 0.8 * cores:
        print("Compiled PyTorch did not have all cores: other work on this machine makes these figures unfit to quote.")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
