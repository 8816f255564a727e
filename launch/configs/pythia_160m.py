"""ziggurat pretrain --config=pythia_160m --config.data.corpus='texts/*.jsonl'

Pythia 160M (Biderman et al. 2023), of the class GPT-NeoX: 162,322,944 parameters, 300 billion tokens, 2.1 million a
step. A quarter of each head is rotated, and attention and feed-forward read the same input. The recipe is the
published one (models/160M/pythia-160m.yml in EleutherAI/pythia). Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 12,
        "model_dim": 768,
        "num_heads": 12,
        "vocab_size": 50_304,
        "rope_dim": 16,
        "attention_bias": True,
        "activation": "gelu",
        "gated": False,
        "feedforward_bias": True,
        "norm": "layernorm",
        "block": "parallel",
        "remat_policy": "products",
    }
    config.data = {"segment_length": 2048}
    config.tokenizer = {"vocab_size": 50_277}
    config.optimizer = {"learning_rate": 6e-4, "warmup_steps": 1430}
    config.train = {"run_dir": "runs/pythia_160m", "num_steps": 143_000, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
