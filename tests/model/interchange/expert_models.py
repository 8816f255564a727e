"""Small models with experts, at least one for each class of Transformers that has them, as changes of a small model."""

YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 8}
LATENT = {"kv_latent_dim": 12, "head_dim": 12, "rope_dim": 4, "value_dim": 8, "num_kv_heads": 4, "norm_epsilon": 1e-6}
EXPERTS = {"num_experts": 4, "expert_dim": 24}
SHARED = {"shared_expert_dim": 48}
BALANCED = {"router_score": "sigmoid", "balance_bias": True}
ROWS = {"balance_over": "row", "balance_loss": 1e-4}
SINKS = EXPERTS | {"attention_sinks": True, "activation": "clamped_swiglu", "router_score": "softmax_of_chosen"}
EXPERT_MODELS = [
    EXPERTS,
    EXPERTS | {"sliding_window": 5, "feedforward_dim": 24, "router_normalize": True},
    EXPERTS | {"qk_norm": True, "qk_norm_over": "all_heads", "router_normalize": False},
    EXPERTS | {"qk_norm": True, "layer_pattern": "Ff", "head_dim": 16, "balance_loss": 0.0},
    EXPERTS | SHARED | {"shared_expert_gate": True, "shared_expert_dim": 20, "attention_output_bias": False},
    EXPERTS | SHARED | BALANCED | {"qk_norm": True, "rope_dim": 4, "dense_layers": 1},
    EXPERTS | SHARED | {"router_score": "sigmoid"},
    SINKS | {"layer_pattern": "SF", "sliding_window": 5},
    SINKS | {"router_bias": True, "feedforward_bias": True} | YARN | {"rope_truncate": False},
    LATENT | EXPERTS | SHARED | BALANCED | {"router_groups": 2, "router_scale": 2.5, "dense_layers": 1} | ROWS,
    LATENT | EXPERTS | SHARED | {"router_normalize": False, "router_groups": 2},
]
