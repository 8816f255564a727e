"""ziggurat pretrain --config=deepseek_v3 --config.data.corpus='texts/*.jsonl'

DeepSeek-V3 (DeepSeek-AI 2024, section 4.2): 671,026,404,352 parameters, a token uses 37,552,282,624, and 14,848 biases
that balance the load. Behind three dense layers 8 of 256 experts, in 4 of 8 groups, compute a token. The recipe is the
published one: 14.8 trillion tokens; the batch grows to 62.9 million over the first 469 billion, here by
doubling. There the rate falls along a cosine, and the bias and the rate stay the same at the end. Its second prediction
is left out, and its YaRN is from a later stage. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 61,
        "model_dim": 7168,
        "num_heads": 128,
        "head_dim": 192,
        "rope_dim": 64,
        "value_dim": 128,
        "kv_latent_dim": 512,
        "query_latent_dim": 1536,
        "feedforward_dim": 18_432,
        "num_experts": 256,
        "experts_per_token": 8,
        "expert_dim": 2048,
        "dense_layers": 3,
        "shared_expert_dim": 2048,
        "router_score": "sigmoid",
        "router_scale": 2.5,
        "router_groups": 8,
        "router_groups_per_token": 4,
        "balance_bias": True,
        "balance_loss": 1e-4,
        "balance_over": "row",
        "vocab_size": 129_280,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 129_280}
    config.optimizer = {"learning_rate": 2.2e-4, "warmup_steps": 2000, "schedule": "wsd", "decay_fraction": 0.32}
    config.train = {
        "run_dir": "runs/deepseek_v3",
        "num_steps": 247_660,
        "batch_size": 15_360,
        "batch_ramp_start": 3840,
        "batch_ramp_steps": 19_880,
    }
    # In float32 an export takes 2.7 TB. `ziggurat export` writes one to another disk or in another dtype.
    config.checkpoint = {"every_steps": 1000, "export": False}
    return config
