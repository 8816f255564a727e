"""make pretrain, or: ziggurat pretrain --config=tiny

A 4-million-parameter model of Python's standard library, on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The values that differ from the defaults."""
    config = ConfigDict()
    config.model = {"num_layers": 4, "model_dim": 256, "num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True,
                    "compute_dtype": "float32"}  # fmt: skip
    config.data = {"segment_length": 256}
    config.tokenizer = {"vocab_size": 4096}
    config.optimizer = {"learning_rate": 3e-3}
    config.train = {"run_dir": "runs/tiny", "num_steps": 300, "batch_size": 16}
    config.checkpoint = {"every_steps": 100}
    config.evaluation = {"every_steps": 100}
    return config
