"""ziggurat pretrain --config=qwen3_30b_a3b --config.data.corpus='texts/*.jsonl'

Qwen3 30B-A3B (Qwen Team 2025): 30,532,122,624 parameters, of which a token uses 3,353,032,704: in each layer 8 of 128
experts compute it. The balance loss is of the global batch. Its report gives no learning rates and batch sizes; those
here are ours. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 48,
        "model_dim": 2048,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "feedforward_dim": 6144,
        "num_experts": 128,
        "experts_per_token": 8,
        "expert_dim": 768,
        "balance_loss": 0.001,
        "vocab_size": 151_936,
        "rope_base": 1_000_000.0,
        "qk_norm": True,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
        # Each chunk adds to the unembedding's gradient, of 1.2 GB.
        "loss_chunk": 1024,
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 151_669}
    config.optimizer = {"learning_rate": 4e-4, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/qwen3_30b_a3b", "num_steps": 500_000, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
