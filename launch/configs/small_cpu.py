"""ziggurat pretrain --config=small_cpu

For two CPU cores and the patient: 12,588,672 parameters read Python's standard library four times, in about forty
minutes, to 1.14 bits a byte of held-out files (docs/training.md).
"""

from ml_collections import ConfigDict

from launch.configs import tiny


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = tiny.get_config()
    config.model.update({"num_layers": 6, "model_dim": 384, "num_heads": 6, "num_kv_heads": 2})
    # As in the run above, which is older than the rows and the rate of `tiny`.
    config.data.update({"segment_length": 512, "segmentation": "concatenate", "shuffle_rows": False})
    config.optimizer.learning_rate = 6e-3
    config.train.update({"run_dir": "runs/small_cpu", "num_steps": 2200})
    config.checkpoint.every_steps = 500
    return config
