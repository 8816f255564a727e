"""The settings that the stages of run.sh have in common: those of the model of `make pretrain`, and of conversations.

    examples/assistant/run.sh

runs the stages, and README.md shows what each of them does. A conversation of two sums has about 60 tokens.
"""

from ml_collections import ConfigDict

from launch.configs.tiny import get_config as tiny


def get_config() -> ConfigDict:
    """Returns the fields that differ from the defaults."""
    config = tiny()
    # Short rows: an answer that a model samples has a row of its own.
    config.data = {
        "segmentation": "pack",
        "segment_length": 64,
        "messages_field": "messages",
        "chat_template": "examples/chat_template.jinja",
    }
    config.optimizer = {"name": "muon", "warmup_steps": 8, "schedule": "wsd", "decay_fraction": 0.6}
    config.train = {"batch_size": 32, "init_with": "weights"}
    config.checkpoint = {"every_steps": 100}
    # A sample would continue code.
    config.evaluation = {"every_steps": 40, "loop_bytes": 2**13, "sample_tokens": 0}
    return config
