"""ziggurat pretrain --config=tiny_experts

What experts buy in as many multiplications for a token as `tiny` has: 4,427,968 parameters, of which a token uses
2,363,584. Half of a feed-forward computes every token; the other half is one of 8 experts (docs/training.md).
"""

from ml_collections import ConfigDict

from launch.configs import tiny


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = tiny.get_config()
    config.model.update(
        {
            "num_experts": 8,
            "experts_per_token": 1,
            "expert_dim": 256,
            "shared_expert_dim": 256,
            "router_score": "sigmoid",
            "router_normalize": False,
            # Ten times the usual rate: the run has so few steps.
            "balance_bias": True,
            "balance_rate": 0.01,
        }
    )
    config.train.run_dir = "runs/tiny_experts"
    return config
