"""ziggurat pretrain --config=gpt_oss_20b --config.data.corpus='texts/*.jsonl'

gpt-oss-20b (OpenAI 2025): 20,914,757,184 parameters, a token uses 4,187,440,704: in each layer 4 of 32 experts, which
have biases, compute it. Every second layer has a window of 128 positions, and each head a sink. Its model card
gives no learning rate and batch size, nor how the load was balanced; those here are ours. The published model has YaRN,
from a longer context. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 24,
        "model_dim": 2880,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 64,
        "feedforward_dim": 2880,
        "activation": "clamped_swiglu",
        "feedforward_bias": True,
        "num_experts": 32,
        "experts_per_token": 4,
        "router_score": "softmax_of_chosen",
        "router_bias": True,
        "vocab_size": 201_088,
        "rope_base": 150_000.0,
        "attention_bias": True,
        "attention_sinks": True,
        "sliding_window": 128,
        "layer_pattern": "SF",
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 201_088}
    config.optimizer = {"learning_rate": 4e-4, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/gpt_oss_20b", "num_steps": 500_000, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
