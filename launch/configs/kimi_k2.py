"""ziggurat pretrain --config=kimi_k2 --config.data.corpus='texts/*.jsonl'

Kimi K2 (Kimi Team 2025), of the class DeepSeek-V3: 1,026,408,209,408 parameters, of which a token uses 32,861,477,888,
and 23,040 biases that balance the load. Behind a dense layer 8 of 384 experts compute a token. The recipe is the
published one: Muon, 15.5 trillion tokens, 67 million a step; there it also rescales queries and keys whose product
grows, and the rate falls along a cosine. Its YaRN is from a later stage. Only its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 61,
        "model_dim": 7168,
        "num_heads": 64,
        "head_dim": 192,
        "rope_dim": 64,
        "value_dim": 128,
        "kv_latent_dim": 512,
        "query_latent_dim": 1536,
        "feedforward_dim": 18_432,
        "num_experts": 384,
        "experts_per_token": 8,
        "expert_dim": 2048,
        "dense_layers": 1,
        "shared_expert_dim": 2048,
        "router_score": "sigmoid",
        "router_scale": 2.827,
        "balance_bias": True,
        "balance_loss": 0.001,
        "balance_over": "row",
        "vocab_size": 163_840,
        "rope_base": 50_000.0,
        "norm_epsilon": 1e-6,
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 163_840}
    config.optimizer = {
        "name": "muon",
        "learning_rate": 2e-4,
        "warmup_steps": 500,
        "schedule": "wsd",
        "decay_fraction": 0.355,
    }
    config.train = {"run_dir": "runs/kimi_k2", "num_steps": 231_000, "batch_size": 16_384}
    # In float32 an export takes 4.1 TB. `ziggurat export` writes one to another disk or in another dtype.
    config.checkpoint = {"every_steps": 1000, "export": False}
    return config
