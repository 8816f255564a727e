"""ziggurat pretrain --config=small --config.data.corpus='texts/*.jsonl'

For one consumer GPU of 16 GB or more: 125,849,856 parameters, 2.6 billion tokens, 16 rows of 1,024 tokens at a time.
Weights, gradients and moments take 1.7 GB. Its choices were compared on a twin of 3 million parameters, where they save
0.2 of 1.96 bits a byte (docs/training.md; `python -m tests.benchmarks.small_model`). Not yet run on a GPU.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 12,
        "model_dim": 768,
        "num_heads": 12,
        "num_kv_heads": 4,
        "qk_norm": True,
        "scale_embeddings": True,
        "remat_policy": "products",
    }
    # The window of 128 streams, 32 MB of text, is packed before the first step.
    config.data = {
        "segmentation": "pack",
        "shuffle_rows": True,
        "shuffle_window": 2**18,
        "segment_length": 1024,
        "num_workers": 2,
    }
    config.tokenizer = {"vocab_size": 32_768}
    # The recipe of `tiny`, with a quarter of the twin's learning rate, at four times its width.
    config.optimizer = {
        "name": "muon",
        "learning_rate": 3e-3,
        "warmup_steps": 500,
        "muon_momentum": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.2,
        "schedule": "wsd",
        "decay_fraction": 0.65,
        "final_fraction": 0.01,
    }
    config.train = {"run_dir": "runs/small", "num_steps": 20_000, "batch_size": 128, "accumulation_steps": 8}
    config.checkpoint = {"every_steps": 1000}
    return config
