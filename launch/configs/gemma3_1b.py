"""ziggurat pretrain --config=gemma3_1b --config.data.corpus='texts/*.jsonl'

Gemma 3 1B (Gemma Team 2025): 999,885,952 parameters, norms before and after each branch, and a window of 512 positions
in five of six layers, whose rotary base is another. Its report says 2 trillion tokens in rows of 32,768, learned from a
larger model's predictions, and gives no learning rates and batch sizes; those here are ours. For TPUs: cuDNN's
attention has no heads of 256. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 26,
        "model_dim": 1152,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 256,
        "feedforward_dim": 6912,
        "vocab_size": 262_144,
        "tie_embeddings": True,
        "scale_embeddings": True,
        "rope_base": 1_000_000.0,
        "window_rope_base": 10_000.0,
        "qk_norm": True,
        "sliding_window": 512,
        "layer_pattern": "SSSSSF",
        "activation": "gelu_tanh",
        "norm_offset": True,
        "norm_placement": "both",
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 32_768}
    config.tokenizer = {"vocab_size": 262_144}
    config.optimizer = {"learning_rate": 1e-3, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/gemma3_1b", "num_steps": 954_000, "batch_size": 64}
    config.checkpoint = {"every_steps": 1000}
    return config
