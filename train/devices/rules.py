"""The one table of which mesh axis shares which logical axis."""

from model.sharding import Layout, MeshAxes
from train.config.run_config import MeshConfig

AXES = ("slice", "data", "fsdp", "context", "tensor")
# Logical axis → mesh axes. Weights are stored in shards of their model width and gathered for use, a layer at a time;
# `tensor` shares heads, feed-forward width and vocabulary, and between them the residual stream's positions; `context`
# shares the positions everywhere. Slices, whose links to each other are slow, and `data` have whole copies.
DEFAULT_RULES: dict[str, MeshAxes] = {
    "batch": ("slice", "data", "fsdp"),
    "sequence": ("context", "tensor"),
    "time": ("context",),
    "model": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "feedforward": ("tensor",),
    "vocabulary": ("tensor",),
    "lookup": ("tensor",),
}
TRAINING = Layout(DEFAULT_RULES)
# One sequence at a time on all devices: nothing to share over the batch or the positions.
GENERATION = Layout(DEFAULT_RULES | {"batch": None, "sequence": None, "time": None})
# What the decoder makes, by its logical axes: in none of them may two axes be shared by the same mesh axis.
ACTIVATIONS = (
    ("batch", "sequence"),
    ("batch", "time", "heads"),
    ("batch", "time", "kv_heads"),
    ("batch", "time", "feedforward"),
    ("batch", "time", "vocabulary"),
)


def training_layout(config: MeshConfig) -> Layout:
    """The rules with what the config changes of them."""
    return Layout(DEFAULT_RULES | {axis: tuple(mesh) for axis, mesh in config.rules.items()})
