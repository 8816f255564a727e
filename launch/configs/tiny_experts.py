"""ziggurat pretrain --config=tiny_experts

What experts buy in as many multiplications for a token as `tiny` has: 4,133,056 parameters, of which a token uses
2,363,584. Each token goes through 2 of 8 feed-forwards, each half as wide as that of `tiny` (docs/training.md).
"""

from ml_collections import ConfigDict

from launch.configs import tiny


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = tiny.get_config()
    config.model.update({"num_experts": 8, "experts_per_token": 2, "expert_dim": 256})
    config.train.run_dir = "runs/tiny_experts"
    return config
