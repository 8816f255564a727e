"""The target of tests/benchmarks/ladder.py: two layers, as all of its rungs have, and 17 tokens a parameter.

So the family's dial is the width alone, of many small heads. Of so small a model an unembedding of many tokens would be
most, and no rung can shrink that, so the vocabulary has 512. In longer segments the target learns to copy what came
before, and its rungs do not, which no law foresees (docs/ladder.md).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 2,
        "model_dim": 256,
        "num_heads": 8,
        "num_kv_heads": 2,
        "qk_norm": True,
        "scale_embeddings": True,
    }
    config.tokenizer = {"vocab_size": 512}
    config.data = {"segmentation": "pack", "shuffle_rows": True, "segment_length": 32, "validation_fraction": 0.02}
    config.optimizer = {
        "name": "muon",
        "learning_rate": 6e-3,
        "warmup_steps": 104,
        "muon_momentum": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.2,
        "schedule": "wsd",
        "decay_fraction": 0.3,
        "final_fraction": 0.01,
    }
    config.train = {"run_dir": "runs/target", "num_steps": 13000, "batch_size": 64}
    config.checkpoint = {"every_steps": 2000}
    config.evaluation = {"every_steps": 13000, "max_bytes": 2**21, "sample_tokens": 0}
    return config
