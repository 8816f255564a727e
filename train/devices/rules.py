"""The table of sharding rules: which mesh axes shard which logical axis."""

from model.sharding import Layout, MeshAxes
from train.config.run_config import MeshConfig

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")
# Logical axis → mesh axes. Weights are sharded over their model width and all-gathered for use, a layer at a time.
# `tensor` shards heads, feed-forward width and vocabulary, and between them the residual stream's positions; `context`
# shards the positions everywhere. `expert` shards experts, whose tokens travel, and is one more `fsdp` to all else.
# Slices, whose links to each other are slow, and `data` have replicas.
DEFAULT_RULES: dict[str, MeshAxes] = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "sequence": ("context", "tensor"),
    "time": ("context",),
    "model": ("fsdp", "expert", "context"),
    "latent": ("fsdp", "expert", "context"),
    "experts": ("expert",),
    "expert_model": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "feedforward": ("tensor",),
    "vocabulary": ("tensor",),
    "lookup": ("tensor",),
}
TRAINING = Layout(DEFAULT_RULES)
# One sequence at a time on all devices, so neither batch nor positions are sharded.
GENERATION = Layout(DEFAULT_RULES | {"batch": None, "sequence": None, "time": None})
# Logical axes of the decoder's activations. No two axes of one array may be sharded over the same mesh axis.
ACTIVATIONS = (
    ("batch", "sequence"),
    ("batch", "time", "heads"),
    ("batch", "time", "kv_heads"),
    ("batch", "time", "feedforward"),
    ("batch", "time", "vocabulary"),
)


def training_layout(config: MeshConfig) -> Layout:
    """Returns the default rules with the changes of the config."""
    return Layout(DEFAULT_RULES | {axis: tuple(mesh) for axis, mesh in config.rules.items()})
