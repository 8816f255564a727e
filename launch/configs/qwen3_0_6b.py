"""ziggurat pretrain --config=qwen3_0_6b --config.data.corpus='texts/*.jsonl'

Qwen3 0.6B (Qwen Team 2025): 596,049,920 parameters, heads wider than model_dim / num_heads, and norms of queries and
keys. Its report gives no learning rates and batch sizes; those here are ours. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 28,
        "model_dim": 1024,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "feedforward_dim": 3072,
        "vocab_size": 151_936,
        "tie_embeddings": True,
        "rope_base": 1_000_000.0,
        "qk_norm": True,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 151_669}
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/qwen3_0_6b", "num_steps": 500_000, "batch_size": 256}
    config.checkpoint = {"every_steps": 1000}
    return config
