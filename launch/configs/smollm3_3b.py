"""ziggurat pretrain --config=smollm3_3b --config.data.corpus='texts/*.jsonl'

SmolLM3 3B (Bakouch et al. 2025): 3,075,098,624 parameters, no positions in every fourth layer. The recipe is the
published one, without its change of texts: 11.1 trillion tokens in rows of 4,096, 2.4 million a step. There embeddings
have no weight decay. The rotary base is that of the published model, raised when its context grew to 65,536 tokens.
Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 36,
        "model_dim": 2048,
        "num_heads": 16,
        "num_kv_heads": 4,
        "feedforward_dim": 11_008,
        "vocab_size": 128_256,
        "tie_embeddings": True,
        "rope_base": 5_000_000.0,
        "layer_pattern": "FFFN",
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 128_256}
    config.optimizer = {
        "learning_rate": 2e-4,
        "warmup_steps": 2000,
        "schedule": "wsd",
        "decay_fraction": 0.1,
        "final_fraction": 0.0,
    }
    config.train = {"run_dir": "runs/smollm3_3b", "num_steps": 4_720_000, "batch_size": 576}
    config.checkpoint = {"every_steps": 1000}
    return config
