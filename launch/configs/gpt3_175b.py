"""ziggurat pretrain --config=gpt3_175b --config.data.corpus='texts/*.jsonl' --config.mesh.tensor=8

GPT-3 (Brown et al. 2020): 174,604,259,328 parameters, 300 billion tokens. The rate rises over the first 375 million;
the batch grows from 49 thousand tokens to 3.1 million over the first 12 billion, by doubling; in the paper it grows
linearly. All layers have dense attention; in the paper every other layer's is banded. For hundreds of accelerators:
only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 96,
        "model_dim": 12_288,
        "num_heads": 96,
        "vocab_size": 50_257,
        "tie_embeddings": True,
        "position": "learned",
        "max_positions": 2048,
        "activation": "gelu_tanh",
        "gated": False,
        "attention_bias": True,
        "feedforward_bias": True,
        "norm": "layernorm",
        "remat_policy": "full",
    }
    config.data = {"segment_length": 2048}
    config.tokenizer = {"vocab_size": 50_257}
    config.optimizer = {"learning_rate": 0.6e-4, "warmup_steps": 5760}
    config.train = {
        "run_dir": "runs/gpt3_175b",
        "num_steps": 114_800,
        "batch_size": 1536,
        "batch_ramp_start": 24,
        "batch_ramp_steps": 23_250,
    }
    # In float32 an export takes 698 GB. `ziggurat export` writes one to another disk or in another dtype.
    config.checkpoint = {"every_steps": 1000, "export": False}
    return config
