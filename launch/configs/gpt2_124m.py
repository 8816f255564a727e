"""ziggurat pretrain --config=gpt2_124m --config.data.corpus='texts/*.jsonl'

GPT-2's smallest model (Radford et al. 2019): 124,439,808 parameters, learned positions, dropout of 0.1, half a million
tokens a step. Its recipe was not published; learning rate and weight decay are those of GPT-3's 125M model (Brown et
al. 2020).
`python -m tests.benchmarks.presets` trains it at a reduced batch: after 300 steps of 1,024 tokens of the default corpus
its loss on held-out documents is 6.39 nats a token; their unigram entropy is 7.05 (version 0.2.0).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 12,
        "model_dim": 768,
        "num_heads": 12,
        "vocab_size": 50_257,
        "tie_embeddings": True,
        "position": "learned",
        "max_positions": 1024,
        "activation": "gelu_tanh",
        "gated": False,
        "attention_bias": True,
        "feedforward_bias": True,
        "norm": "layernorm",
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "remat_policy": "products",
    }
    config.data = {"segment_length": 1024}
    config.tokenizer = {"vocab_size": 50_257}
    config.optimizer = {"learning_rate": 6e-4}
    config.train = {"run_dir": "runs/gpt2_124m", "num_steps": 100_000, "batch_size": 512, "accumulation_steps": 32}
    config.checkpoint = {"every_steps": 1000}
    return config
