"""ziggurat pretrain --config=llama2_7b --config.data.corpus='texts/*.jsonl'

Llama 2 7B (Touvron et al. 2023, section 2): 6,738,415,616 parameters, 2 trillion tokens, 4.2 million a step. Weights,
gradients and moments take 108 GB over all accelerators: only its shapes have been tested.
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
        "vocab_size": 32_000,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 32_000}
    config.optimizer = {"learning_rate": 3e-4, "warmup_steps": 2000, "epsilon": 1e-5}
    config.train = {"run_dir": "runs/llama2_7b", "num_steps": 480_000, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
