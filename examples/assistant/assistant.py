"""What the stages of run.sh have in common: the model of `make pretrain`, as an assistant that adds.

A conversation of two sums takes about 60 tokens. A row of 64 is short, since sampled answers have a row each.
"""

from ml_collections import ConfigDict

from launch.configs.tiny import get_config as tiny


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = tiny()
    config.data = {
        "segmentation": "pack",
        "segment_length": 64,
        "messages_field": "messages",
        "chat_template": "examples/chat_template.jinja",
    }
    config.train = {"batch_size": 32, "init_with": "weights"}
    config.optimizer = {"name": "muon", "warmup_steps": 8, "weight_decay": 0.0, "schedule": "wsd", "decay_fraction": 0.5}
    config.evaluation = {"every_steps": 50, "loop_bytes": 2**13}
    config.checkpoint = {"every_steps": 100}
    return config
