"""ziggurat pretrain --config=olmo3_7b --config.data.corpus='texts/*.jsonl'

OLMo 3 7B (OLMo Team 2025): 7,298,011,136 parameters, as OLMo 2, with a window of 4,096 positions in three of four
layers. The recipe is that with which pretraining began (OLMo-3-1025-7B-pretrain-1.py in allenai/OLMo-core), 5 trillion
tokens, 4.2 million a step; it was later stretched to 7 trillion. There embeddings have no weight decay. The published
model has YaRN in the other layers, from a later stage. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 32,
        "model_dim": 4096,
        "num_heads": 32,
        "feedforward_dim": 11_008,
        "vocab_size": 100_278,
        "rope_base": 500_000.0,
        "qk_norm": True,
        "qk_norm_over": "all_heads",
        "sliding_window": 4096,
        "layer_pattern": "SSSF",
        "norm_placement": "output",
        "norm_epsilon": 1e-6,
        "z_loss": 1e-5,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 8192}
    config.tokenizer = {"vocab_size": 100_278}
    config.optimizer = {"learning_rate": 3e-4, "warmup_steps": 2000}
    config.train = {"run_dir": "runs/olmo3_7b", "num_steps": 1_192_000, "batch_size": 512}
    config.checkpoint = {"every_steps": 1000}
    return config
