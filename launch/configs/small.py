"""ziggurat pretrain --config=small --config.data.corpus='texts/*.jsonl'

For one consumer GPU of 16 GB or more: 125,849,856 parameters, 2.6 billion tokens, 16 rows of 1,024 tokens at a time.
Weights, gradients and moments take 1.7 GB. Muon, scaled embeddings and norms of queries and keys were chosen on a twin
of 3 million parameters, where they save 0.05 of 1.85 bits a byte at equal tokens (docs/training.md;
`python -m tests.benchmarks.small_model`). Not yet run on a GPU.
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
    config.data = {"segment_length": 1024, "num_workers": 2}
    config.tokenizer = {"vocab_size": 32_768}
    # A quarter of the twin's learning rate, at four times its width.
    config.optimizer = {"name": "muon", "learning_rate": 1.5e-3, "warmup_steps": 500}
    config.train = {"run_dir": "runs/small", "num_steps": 20_000, "batch_size": 128, "accumulation_steps": 8}
    config.checkpoint = {"every_steps": 1000}
    return config
