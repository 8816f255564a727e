"""Tokens a second of prefill and cached decoding, beside Transformers and llama.cpp with the same weights.

    python -m tests.benchmarks.generate

A model of 40 M random parameters continues the same prompts greedily, in float32 and with 8-bit weights (ours in int8,
llama.cpp's in q8_0), with a float32 cache, on the CPU with the same number of threads, one prompt at a time and eight
at once. Prefill is timed to the first token; decoding is what NEW tokens take beyond that. The programs take turns, and
the median of the rounds counts. llama.cpp (xllamacpp) is left out where it is not installed. Beside them are the matrix
products of a prefill alone, in float32, by XLA for one prompt after another, as ours reads them, and by PyTorch for all
at once, as Transformers does. All have the memory settings of `ziggurat generate`. The last line is one JSON object.
"""

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from data.tokenizer.training import train_tokenizer
from launch.memory import LONG_RUN
from model.config import ModelConfig
from model.generation.generator import Generator
from model.generation.sampling import GREEDY
from model.interchange.tensors import reader_of
from model.parameters import count_parameters, initial_weights
from tests.llama_cpp import LlamaCpp
from train.devices.mesh import one_device_mesh
from train.devices.rules import GENERATION
from train.weights.gguf import write_gguf
from train.weights.huggingface import write_huggingface
from train.weights.weight_source import WeightSource

THREADS = 2
PROMPT, NEW, BATCHES, ROUNDS, CONTEXT = 256, 64, (1, 8), 3, 512
MODEL = {"num_layers": 12, "model_dim": 512, "num_heads": 8, "feedforward_dim": 1408, "compute_dtype": "float32"}

# Ours → the programs that it is compared with.
COMPARED = {
    "ziggurat": {"transformers", "llama.cpp", "XLA's products", "torch's products"},
    "ziggurat int8": {"ziggurat", "transformers", "llama.cpp q8_0"},
}

# Continues prompts of the same length by so many tokens each.
Continue = Callable[[list[list[int]], int], list[list[int]]]


def ours(config: ModelConfig, weights: Any, int8: bool) -> Continue:
    generator = Generator(config, weights, context=CONTEXT, eos_id=-1, layout=GENERATION, int8=int8)

    def go(prompts: list[list[int]], new: int) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for piece in generator(prompts, max_new_tokens=new, sampling=GREEDY, batch_size=len(prompts)):
            found[piece.prompt_index] += piece.tokens
        return found

    return go


def of_transformers(folder: Path) -> Continue:
    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def go(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return found[:, ids.shape[1] :].tolist()

    return go


def of_llama_cpp(file: Path, rows: int) -> Continue:
    server = LlamaCpp(file, context=CONTEXT * rows, parallel=rows, threads=THREADS)
    pool = ThreadPoolExecutor(rows)

    def go(prompts: list[list[int]], new: int) -> list[list[int]]:
        return list(pool.map(lambda prompt: server.continued(prompt, new), prompts))

    return go


def seconds(go: Continue, prompts: list[list[int]], new: int) -> float:
    begun = time.perf_counter()
    found = go(prompts, new)
    took = time.perf_counter() - begun
    assert [len(tokens) for tokens in found] == [new] * len(prompts)
    return took


def measure(programs: dict[str, Continue], prompts: list[list[int]]) -> dict[str, dict[str, float]]:
    """By program: tokens a second of "prefill" and "decode", and the part of its tokens that are ours in float32."""
    first = {name: go(prompts, NEW) for name, go in programs.items()}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, go in programs.items():
            took[name].append((seconds(go, prompts, 1), seconds(go, prompts, NEW)))
    found = {}
    for name, times in took.items():
        prefill = statistics.median(to_first for to_first, _ in times)
        decode = statistics.median(whole - to_first for to_first, whole in times)
        same = np.mean(np.array(first[name]) == np.array(first["ziggurat"]))
        found[name] = {
            "prefill": len(prompts) * PROMPT / prefill,
            "decode": len(prompts) * (NEW - 1) / decode,
            "same_tokens": float(same),
        }
    return found


def products(config: ModelConfig) -> dict[str, Callable[[int], Any]]:
    """By library: what does the matrix products of a prefill of so many prompts, and little else."""
    D, F = config.model_dim, config.feedforward_dim
    random, shapes = np.random.default_rng(1), [(D, D)] * 4 + [(F, D)] * 2 + [(D, F)]
    draw = lambda *shape: random.normal(0, 0.02, shape).astype(np.float32)
    layers = [[draw(*shape) for shape in shapes] for _ in range(config.num_layers)]
    x, all = draw(PROMPT, D), torch.from_numpy(draw(max(BATCHES) * PROMPT, D))
    of_torch = [[torch.from_numpy(weight) for weight in layer] for layer in layers]

    def chain(x: Any, layers: Any) -> Any:
        for query, key, value, output, gate, up, down in layers:
            x = (x @ query.T + x @ key.T + x @ value.T) @ output.T
            x = (x @ gate.T + x @ up.T) @ down.T
        return x

    compiled, of_xla = jax.jit(chain), jax.device_put(layers)
    return {
        "XLA's products": lambda batch: [jax.block_until_ready(compiled(x, of_xla)) for _ in range(batch)],
        "torch's products": lambda batch: chain(all[: batch * PROMPT], of_torch),
    }


def measure_products(config: ModelConfig, batch: int) -> dict[str, float]:
    """By library: tokens a second, as `measure`."""
    libraries = products(config)
    took: dict[str, list[float]] = {name: [] for name in libraries}
    for _ in range(ROUNDS + 1):
        for name, go in libraries.items():
            begun = time.perf_counter()
            go(batch)
            took[name].append(time.perf_counter() - begun)
    return {name: batch * PROMPT / statistics.median(times[1:]) for name, times in took.items()}


def main() -> None:
    if os.environ.get("GLIBC_TUNABLES") != LONG_RUN:
        os.environ["GLIBC_TUNABLES"] = LONG_RUN
        os.execv(sys.executable, sys.orig_argv)
    # JAX takes as many threads as there are processors when it first starts.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as temporary, jax.set_mesh(one_device_mesh()):
        folder = Path(temporary)
        sources = sorted(Path(__file__).parent.parent.parent.glob("*/*.py"))
        tokenizer = train_tokenizer([file.read_text() for file in sources], 2048, folder / "tokenizer")
        config = ModelConfig(**MODEL).resolved(tokenizer.vocab_size)
        weights = jax.jit(lambda: initial_weights(config, 0, GENERATION))()
        source = WeightSource(config, CONTEXT, tokenizer, reader_of(jax.device_get(weights)))
        write_huggingface(folder / "hf", source)
        programs = {"ziggurat": ours(config, weights, False), "transformers": of_transformers(folder / "hf")}
        programs["ziggurat int8"] = ours(config, weights, True)
        of_dtype = {"f32": "llama.cpp", "q8_0": "llama.cpp q8_0"} if importlib.util.find_spec("xllamacpp") else {}
        for dtype in of_dtype:
            write_gguf(folder / f"{dtype}.gguf", source, dtype)
        print(f"{count_parameters(config):,} parameters, {PROMPT} tokens a prompt, {NEW} new, {THREADS} threads")
        print(f"{'tokens/s':16} {'batch':>5} {'prefill':>9} {'decode':>9}   as float32")
        random, results = np.random.default_rng(0), {}
        for batch in BATCHES:
            prompts = random.integers(3, config.vocab_size, (batch, PROMPT)).tolist()
            of_batch = {name: of_llama_cpp(folder / f"{dtype}.gguf", batch) for dtype, name in of_dtype.items()}
            found = measure(programs | of_batch, prompts)
            for name, of in found.items():
                print(f"{name:16} {batch:5} {of['prefill']:9.1f} {of['decode']:9.1f}   {of['same_tokens']:.0%}")
            for name, rate in measure_products(config, batch).items():
                print(f"{name:16} {batch:5} {rate:9.1f}", flush=True)
                found[name] = {"prefill": rate}
            results[f"batch_{batch}"] = found
        for found in results.values():
            for ours_name, peers in COMPARED.items():
                for peer in found.keys() & peers:
                    for what in found[peer].keys() & {"prefill", "decode"}:
                        found[ours_name][f"{what}_of_{peer}"] = found[ours_name][what] / found[peer][what]
        print(json.dumps(results))


if __name__ == "__main__":
    main()
