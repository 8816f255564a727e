"""The target of tests/benchmarks/ladder.py: `tiny` as a family of small heads, with a small vocabulary.

A third of `tiny` is the unembedding of 4,096 tokens, which no rung can shrink. With 1,024 the default corpus has 3.7
million tokens, so nothing is read twice. At half and at twice the learning rate the first and the fifth rung of a
family of three layers learned less.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 6,
        "model_dim": 192,
        "num_heads": 6,
        "num_kv_heads": 2,
        "qk_norm": True,
        "scale_embeddings": True,
    }
    config.tokenizer = {"vocab_size": 1024}
    config.data = {"corpus": "stdlib", "segmentation": "pack", "shuffle_rows": True, "segment_length": 128}
    config.optimizer = {
        "name": "muon",
        "learning_rate": 8e-3,
        "warmup_steps": 16,
        "muon_momentum": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.2,
        "schedule": "wsd",
        "decay_fraction": 0.5,
        "final_fraction": 0.01,
    }
    config.train = {"run_dir": "runs/target", "num_steps": 1600, "batch_size": 16}
    config.checkpoint = {"every_steps": 400}
    config.evaluation = {"every_steps": 1600, "max_bytes": 2**18, "sample_tokens": 0}
    return config
