"""ziggurat pretrain --config=vaswani_base --config.data.corpus='texts/*.jsonl'

The decoder side of "Attention Is All You Need" (Vaswani et al. 2017), base model: 37,846,016 parameters, with the
paper's recipe (section 5): post-norm, sinusoidal positions, 24,576 tokens a step, dropout and label smoothing 0.1, an
inverse square root schedule whose peak is 512^-0.5 · 4000^-0.5. As in the paper, attention has no biases.
`python -m tests.benchmarks.presets` trains it at a reduced batch: after 300 steps of 1,024 tokens of the default corpus
in a vocabulary of 512, its loss on held-out documents is 4.62 nats a token; the unigram entropy is 5.00.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 6,
        "model_dim": 512,
        "num_heads": 8,
        "feedforward_dim": 2048,
        "vocab_size": 37_000,
        "tie_embeddings": True,
        "scale_embeddings": True,
        "position": "sinusoidal",
        "activation": "relu",
        "gated": False,
        "feedforward_bias": True,
        "norm": "layernorm",
        "norm_placement": "post",
        "embedding_dropout": 0.1,
        "residual_dropout": 0.1,
        "label_smoothing": 0.1,
    }
    config.tokenizer = {"vocab_size": 37_000}
    config.optimizer = {
        "learning_rate": 512**-0.5 * 4000**-0.5,
        "schedule": "inverse_sqrt",
        "warmup_steps": 3999,  # the 4000th update is the first at the peak
        "beta2": 0.98,
        "epsilon": 1e-9,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
    }
    config.train = {"run_dir": "runs/vaswani_base", "num_steps": 100_000, "batch_size": 96}
    config.checkpoint = {"every_steps": 1000}
    return config
