"""ziggurat pretrain --config=olmoe_1b_7b --config.data.corpus='texts/*.jsonl'

OLMoE 1B-7B (Muennighoff et al. 2024): 6,919,161,856 parameters, of which a token uses 1,282,017,280: in each layer 8 of
64 experts compute it. The recipe is the published one: 5.1 trillion tokens, 4.2 million a step, a balance loss and a
z-loss of the router. There embeddings and norms decay, too, and the last 100 billion tokens take the rate to zero. Only
its shapes have been tested.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = ConfigDict()
    config.model = {
        "num_layers": 16,
        "model_dim": 2048,
        "num_heads": 16,
        "feedforward_dim": 1024,
        "num_experts": 64,
        "experts_per_token": 8,
        "router_normalize": False,
        "router_z_loss": 0.001,
        "vocab_size": 50_304,
        "qk_norm": True,
        "qk_norm_over": "all_heads",
        "remat_policy": "full",
    }
    config.data = {"segment_length": 4096}
    config.tokenizer = {"vocab_size": 50_280}
    config.optimizer = {"learning_rate": 4e-4, "warmup_steps": 2500}
    config.train = {"run_dir": "runs/olmoe_1b_7b", "num_steps": 1_223_842, "batch_size": 1024}
    config.checkpoint = {"every_steps": 1000}
    return config
