"""The target of tests/benchmarks/ladder.py: `tiny` as a family of small heads, with a small vocabulary.

A third of its size would be the unembedding of 4,096 tokens, which no rung can shrink. It reads 3.3 million tokens, as
many as the default corpus has with 1,024, so nothing is read twice. The learning rate is that at which the first and the
fifth rung are best, by trials of half and twice as much.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 3,
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
