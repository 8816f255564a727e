"""What it saves that one pass over a segment trains every prefix at once, against a pass for each prefix.

    python -m tests.benchmarks.one_pass --config=tiny [--config.GROUP.FIELD=VALUE ...]

A pass is forward and backward over one row. Passes over prefixes are timed at 16 lengths, each with the loss of its
last position alone, and summed for all T by holding each time for T/16 lengths. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from launch.presets import add_config_arguments, load_config
from train.mesh import batch_sharding, on_one_device
from train.optimizer import make_optimizer
from train.state import make_state
from train.step import summed_loss

ROUNDS, LENGTHS = 7, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    config = config.resolved(config.tokenizer.vocab_size)
    T = config.data.segment_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, T + 1), dtype=np.int32)

    def batch(length: int, trained: int) -> dict[str, np.ndarray]:
        """A row of the first `length` tokens, of which the last `trained` count."""
        return {
            "tokens": tokens[:, :length],
            "targets": tokens[:, 1 : length + 1],
            "positions": np.arange(length, dtype=np.int32)[None],
            "segment_ids": np.ones((1, length), np.int32),
            "loss_weights": (np.arange(length) >= length - trained).astype(np.float32)[None],
        }

    with jax.set_mesh(on_one_device()):
        weights = make_state(config, make_optimizer(config))["weights"]
        gradient = jax.jit(jax.grad(lambda weights, batch: summed_loss(config, weights, batch)[0]))

        def seconds(batch: dict[str, np.ndarray]) -> float:
            batch = jax.device_put(batch, batch_sharding(jax.sharding.get_mesh()))
            jax.block_until_ready(gradient(weights, batch))
            found = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                jax.block_until_ready(gradient(weights, batch))
                found.append(time.perf_counter() - start)
            return statistics.median(found)

        one = seconds(batch(T, T))
        lengths = [T * (i + 1) // LENGTHS for i in range(LENGTHS)]
        all_prefixes = sum(seconds(batch(length, 1)) for length in lengths) * T / LENGTHS
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
