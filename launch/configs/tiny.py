"""make pretrain, or: ziggurat pretrain --config=tiny

A first run on two CPU cores, in about two and a half minutes: 2,360,512 parameters learn Python's standard library
(that of Python 3.11) to 1.64 bits a byte of held-out files; xz -9 needs 1.75 and gzip -9 1.90.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    # Small, since steps are few: in the same time a wider or deeper model sees too little text (docs/training.md).
    config.model = {
        "num_layers": 2,
        "model_dim": 192,
        "num_heads": 3,
        "num_kv_heads": 1,
        "qk_norm": True,
        "scale_embeddings": True,
    }
    # Its files are longer than a segment: neighbours of one file would be a batch's rows for many steps.
    config.data = {"corpus": "stdlib", "segmentation": "pack", "shuffle_rows": True}
    # The best of the trials in docs/training.md; `python -m tests.benchmarks.learning` compares it with AdamW.
    config.optimizer = {
        "name": "muon",
        "learning_rate": 1.2e-2,
        "warmup_steps": 8,
        "muon_momentum": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.2,
        "schedule": "wsd",
        "decay_fraction": 0.65,
        "final_fraction": 0.01,
    }
    config.train = {"run_dir": "runs/tiny", "num_steps": 900, "batch_size": 8}
    config.checkpoint = {"every_steps": 250}
    config.evaluation = {"every_steps": 100, "loop_bytes": 2**15}
    return config
