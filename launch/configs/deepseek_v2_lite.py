"""ziggurat pretrain --config=deepseek_v2_lite --config.data.corpus='texts/*.jsonl'

DeepSeek-V2-Lite (DeepSeek-AI 2024, appendix B): 15,706,484,224 parameters, of which a token uses 2,661,150,208. Keys
and values are made of a latent; behind a dense layer 6 of 64 experts compute a token, and a shared one computes all.
The recipe is the published one: 5.7 trillion tokens, 18.9 million a step. There the rate falls in two steps in the last
fifth, where here it falls linearly to the same end. The published model has YaRN, from a later stage. Only its shapes
have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 27,
        "model_dim": 2048,
        "num_heads": 16,
        "head_dim": 192,
        "rope_dim": 64,
        "value_dim": 128,
        "kv_latent_dim": 512,
        "feedforward_dim": 10_944,
        "num_experts": 64,
        "experts_per_token": 6,
        "expert_dim": 1408,
        "dense_layers": 1,
        "shared_expert_dim": 2816,
        "router_normalize": False,
        "balance_loss": 0.001,
        "balance_over": "row",
        "vocab_size": 102_400,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 102_400}
    config.optimizer = {"learning_rate": 4.2e-4, "warmup_steps": 2000, "schedule": "wsd"}
    config.train = {"run_dir": "runs/deepseek_v2_lite", "num_steps": 302_000, "batch_size": 4608}
    config.checkpoint = {"every_steps": 1000}
    return config
