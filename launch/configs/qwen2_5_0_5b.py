"""ziggurat pretrain --config=qwen2_5_0_5b --config.data.corpus='texts/*.jsonl'

Qwen2.5 0.5B (Qwen Team 2024): 494,032,768 parameters, grouped-query attention with biases of queries, keys and values
alone. Its report says that rows have 4,096 tokens until the last stage, and gives no learning rates and batch sizes;
those here are ours. The rotary base is that of the published model, which began with 10,000. Only its shapes have been
tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 24,
        "model_dim": 896,
        "num_heads": 14,
        "num_kv_heads": 2,
        "feedforward_dim": 4864,
        "vocab_size": 151_936,
        "tie_embeddings": True,
        "rope_base": 1_000_000.0,
        "attention_bias": True,
        "attention_output_bias": False,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 151_665}
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/qwen2_5_0_5b", "num_steps": 500_000, "batch_size": 256}
    config.checkpoint = {"every_steps": 1000}
    return config
