"""make pretrain, or: ziggurat pretrain --config=tiny

A first run on two CPU cores, in about seven minutes: 5,048,576 parameters learn Python's standard library (that of
Python 3.11) to 1.72 bits a byte of held-out files; xz -9 needs 1.75 and gzip -9 1.90.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {"num_layers": 4, "model_dim": 256, "num_heads": 4, "num_kv_heads": 2}
    config.data = {"corpus": "stdlib"}
    # The best of trials of 300 and 1000 steps; `python -m tests.benchmarks.learning` compares it with AdamW.
    config.optimizer = {
        "name": "muon",
        "learning_rate": 4e-3,
        "muon_momentum": 0.8,
        "weight_decay": 0.7,
        "schedule": "wsd",
        "decay_fraction": 0.65,
        "final_fraction": 0.0,
    }
    config.train = {"run_dir": "runs/tiny", "num_steps": 1000, "batch_size": 8}
    config.checkpoint = {"every_steps": 250}
    config.evaluation = {"every_steps": 100, "loop_bytes": 2**16}
    return config
