from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"num_layers": 2, "model_dim": 64, "num_heads": 4}
    config.data = {"corpus": "stdlib", "segment_length": 32}
    config.tokenizer = {"vocab_size": 1024}
    config.optimizer = {"learning_rate": 3e-3, "schedule": "wsd"}
    config.train = {"run_dir": "runs/small", "num_steps": 400, "batch_size": 8, "log_every_steps": 100}
    config.checkpoint = {"every_steps": 200, "keep_every_steps": 200}
    config.evaluation = {"max_bytes": 20_000, "loop_bytes": 20_000, "sample_tokens": 16}
    return config
