"""ziggurat pretrain --config=llama3_8b --config.data.corpus='texts/*.jsonl'

Llama 3 8B (Llama Team 2024): 8,030,261,248 parameters, grouped-query attention, 15 trillion tokens, 8.4 million a step.
Weights, gradients and moments take 128 GB over all accelerators: only its shapes have been tested.
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
        "vocab_size": 128_256,
        "rope_base": 500_000.0,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 8192}
    config.tokenizer = {"vocab_size": 128_256}
    config.optimizer = {"learning_rate": 3e-4, "warmup_steps": 8000, "final_fraction": 0.01}
    config.train = {"run_dir": "runs/llama3_8b", "num_steps": 1_800_000, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
