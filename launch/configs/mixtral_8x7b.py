"""ziggurat pretrain --config=mixtral_8x7b --config.data.corpus='texts/*.jsonl'

Mixtral 8x7B (Jiang et al. 2024): 46,702,792,704 parameters, of which a token uses 12,879,925,248: in each layer two of
eight experts compute it. Its paper gives no learning rate, batch size or number of tokens; those here are ours. The
weight of the balance loss is that of its config.json. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 32,
        "model_dim": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "feedforward_dim": 14_336,
        "num_experts": 8,
        "experts_per_token": 2,
        "balance_loss": 0.02,
        "vocab_size": 32_000,
        "rope_base": 1_000_000.0,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 32_768}
    config.tokenizer = {"vocab_size": 32_000}
    config.optimizer = {"learning_rate": 3e-4, "warmup_steps": 2000}
    config.train = {"run_dir": "runs/mixtral_8x7b", "num_steps": 480_000, "batch_size": 128}
    config.checkpoint = {"every_steps": 1000}
    return config
