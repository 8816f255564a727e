"""What it saves that one pass over a segment trains every prefix at once, against a pass for each prefix.

    python -m tests.benchmarks.one_pass --config=tiny [--config.GROUP.FIELD=VALUE ...]

A pass is forward and backward over one row; a prefix's has the logits and loss of its last position alone. Passes over
prefixes are timed at 16 lengths, each in the middle of T/16 of them for which it stands. The last line is one JSON
object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.presets import add_config_arguments, load_config
from model.decoder import Decoder
from model.loss import summed_losses
from train.devices.mesh import batch_sharding, one_device_mesh
from train.devices.rules import TRAINING
from train.step.optimizer import make_optimizer
from train.step.state import make_state
from train.step.step import Batch, summed_loss

ROUNDS, LENGTHS = 7, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    config = config.resolved(config.tokenizer.vocab_size)
    T = config.data.segment_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, T + 1), dtype=np.int32)

    def batch(length: int) -> dict[str, np.ndarray]:
        """A row of the first `length` tokens."""
        return {
            "tokens": tokens[:, :length],
            "targets": tokens[:, 1 : length + 1],
            "positions": np.arange(length, dtype=np.int32)[None],
            "segment_ids": np.ones((1, length), np.int32),
            "loss_weights": np.ones((1, length), np.float32),
        }

    def loss_of_last(weights: dict[str, Any], batch: Batch) -> jax.Array:
        decoder = Decoder(config.model, weights, TRAINING)
        x_BTD = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])[:, -1:]
        targets, weights_BT = batch["targets"][:, -1:], batch["loss_weights"][:, -1:]
        return summed_losses(x_BTD, decoder.unembedding_matrix(), targets, weights_BT, config.model, TRAINING).objective

    with jax.set_mesh(one_device_mesh()):
        weights = make_state(config, make_optimizer(config))["weights"]
        of_all = jax.jit(jax.grad(lambda weights, batch: summed_loss(config, weights, batch)[0]))
        of_last = jax.jit(jax.grad(loss_of_last))

        def seconds(gradient: Callable[..., Any], batch: dict[str, np.ndarray]) -> float:
            batch = jax.device_put(batch, batch_sharding(jax.sharding.get_mesh()))
            jax.block_until_ready(gradient(weights, batch))
            found = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                jax.block_until_ready(gradient(weights, batch))
                found.append(time.perf_counter() - start)
            return statistics.median(found)

        one = seconds(of_all, batch(T))
        lengths = [T * (2 * i + 1) // (2 * LENGTHS) for i in range(LENGTHS)]
        all_prefixes = sum(seconds(of_last, batch(length)) for length in lengths) * T / LENGTHS
    figures = {
        "positions": T,
        "one_pass_seconds": one,
        "passes_of_all_prefixes_seconds": all_prefixes,
        "ratio": all_prefixes / one,
    }
    print(f"one pass over {T} positions, a loss at each   {one:9.4f} s")
    print(
        f"a pass for each of the {T} prefixes           {all_prefixes:9.4f} s, {all_prefixes / one:.0f} times as long"
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
