"""How far training on a mesh is from training on one device.

    python -m tests.benchmarks.meshes

Eight virtual CPU devices; ten minutes on two cores, nearly all the compiler's. Each mesh takes the same three steps of
AdamW as one device; the worst of each figure stands beside the bound that the tests hold it to. The last line is JSON.
"""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import numpy as np

from model.config import ModelConfig
from model.trees import flattened
from tests.small import RECORDS, mesh_of, small_batch, small_model
from train.config.config import Config
from train.config.reading import make_config
from train.devices.mesh import batch_sharding
from train.devices.rules import training_layout
from train.step.optimizer import make_optimizer
from train.step.state import State, abstract_state, make_state
from train.step.step import make_train_step

AXES = [{"slices": 2}, {"data": 8}, {"fsdp": 8}, {"context": 4}, {"tensor": 4}]  # and every pair of them:
MIXED = [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2},
         {"slices": 2, "data": 2, "context": 2}, {"slices": 2, "fsdp": 2, "tensor": 2}]  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt-2": {"position": "learned", "max_positions": 16, "activation": "gelu_tanh", "gated": False,
              "attention_bias": True, "feedforward_bias": True, "norm": "layernorm", "tie_embeddings": True,
              "embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1, "norm_placement": "post",
              "label_smoothing": 0.1},
    "windows": {"layer_pattern": "FSN", "num_layers": 3, "sliding_window": 5, "window_rope_base": 300.0,
                "norm_placement": "both", "norm_offset": True, "qk_norm": True, "qk_norm_over": "all_heads",
                "attention_sinks": True, "attention_scale": 0.3, "logit_softcap": 5.0, "activation": "clamped_swiglu"},
    "latent": {"kv_latent_dim": 16, "query_latent_dim": 8, "head_dim": 12, "rope_dim": 4, "value_dim": 8,
               "sliding_window": 5, "attention_softcap": 5.0, "z_loss": 1e-2, "rope_scaling": "yarn",
               "rope_factor": 2.0, "rope_original_context": 8, "activation": "gelu"},
    "parallel": {"block": "parallel_one_norm", "norm": "layernorm", "norm_bias": False, "rope_dim": 4,
                 "qk_norm": True, "head_dim": 16, "attention_bias": True, "attention_output_bias": False,
                 "activation": "relu2", "gated": False, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
                 "logit_multiplier": 0.5},
    "records": RECORDS | {"num_layers": 3, "tie_embeddings": True, "embedding_dropout": 0.1, "residual_dropout": 0.1,
                          "position": "sinusoidal", "scale_embeddings": True},
}  # fmt: skip
# Mixtures of experts, by their routers.
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"num_experts": 8, "expert_dim": 24, "router_z_loss": 1e-3, "dense_layers": 1},
    "sigmoid": {"num_experts": 8, "expert_dim": 24, "experts_per_token": 3, "router_score": "sigmoid",
                "router_groups": 4, "router_groups_per_token": 2, "router_scale": 2.5, "shared_expert_dim": 16,
                "shared_expert_gate": True, "balance_bias": True, "balance_rate": 0.01, "balance_over": "row",
                "layer_pattern": "Ff", "num_layers": 4},
    "chosen": {"num_experts": 8, "experts_per_token": 4, "expert_dim": 24, "router_score": "softmax_of_chosen",
               "router_bias": True, "feedforward_bias": True, "activation": "clamped_swiglu"},
}  # fmt: skip
EXPERT_MESHES = [{"fsdp": 8}, {"expert": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 4},
                 {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 2, "context": 2, "tensor": 2},
                 {"slices": 2, "data": 2, "expert": 2}, {"fsdp": 2, "context": 2, "tensor": 2},
                 {"data": 2, "expert": 2, "context": 2}]  # fmt: skip
# What docs/tolerances.md promises.
BOUNDS = {
    "float32": {"loss": 2e-6, "grad_norm": 5e-6, "gradients": 5e-6, "weights": 5e-4},
    "bfloat16": {"loss": 2e-3, "grad_norm": 2e-2, "gradients": 5e-2, "weights": 3e-1},
    "8 bits": {"loss": 2e-3, "grad_norm": 2e-2, "gradients": 5e-2, "weights": 3e-1},
    "every floor": {"loss": 5e-6, "grad_norm": 2e-5},
    "experts": {"loss": 5e-6, "grad_norm": 5e-6, "gradients": 5e-6, "weights": 5e-4},
    "processes": {"loss": 1e-5, "grad_norm": 1e-4},
    "chaos": {"loss": 1e-4},
}


class Steps(NamedTuple):
    """Initial weights, the metrics of three steps, the first gradient, and the weights (and average) after them.

    `loads` has the figures of experts, which must be the same everywhere.
    """

    initial: dict[str, np.ndarray]
    metrics: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    loads: list[Any]


def config_for(accumulation_steps: int = 1, rows: int = 8, **model: Any) -> Config:
    """A small model that every mesh here can share."""
    train = {"batch_size": rows, "num_steps": 100, "ema_decay": 0.5, "accumulation_steps": accumulation_steps}
    config = make_config({"train": train, "data": {"segment_length": 16}, "optimizer": {"clip_norm": 0.5}})
    return dataclasses.replace(config, model=small_model(**({"num_kv_heads": 4} | model)))


@functools.cache
def state_of(model: ModelConfig) -> State:
    """The state that training on one device begins with, on the host."""
    config = dataclasses.replace(config_for(), model=model)
    with jax.set_mesh(mesh_of()):
        return jax.device_get(make_state(config, make_optimizer(config)))


def three_steps(config: Config, shape: dict[str, int], from_one_device: bool = False) -> Steps:
    """Three training steps on a mesh, from the state that it makes itself or that one device makes."""
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        optimizer, sharding = make_optimizer(config), batch_sharding(mesh, training_layout(config.mesh))
        if from_one_device or not shape:
            shapes = abstract_state(config, optimizer)
            state = jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), state_of(config.model), shapes)
        else:
            state = make_state(config, optimizer)
        initial = flattened(jax.device_get(state["weights"]))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step, metrics, gradients, loads = make_train_step(config, optimizer), [], {}, []
        for seed in range(3):
            state, found = step(state, jax.device_put(small_batch(config.train.batch_size, seed=seed), sharding))
            loads.append({name: found.pop(name).tolist() for name in list(found) if "expert" in name})
            metrics.append({name: float(value) for name, value in found.items()})
            # After the first step the first moment is a multiple of the clipped gradient.
            gradients = gradients or flattened(jax.device_get(state["optimizer"]["adam"].mu))
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        weights = flattened(jax.device_get({"weights": state["weights"], "average": state["average"]}))
        return Steps(initial, metrics, gradients, weights, loads)


def differences(found: Steps, expected: Steps) -> dict[str, float]:
    """The worst of each figure, relative. Initial weights and counted tokens must be the same.

    Gradients by the norm of each array; weights, too, and relative to how far they went: Adam divides each gradient by
    its own size, so one that is mere rounding (as of a bias of keys) moves its weight freely.
    """
    for name, array in expected.initial.items():
        np.testing.assert_array_equal(found.initial[name], array, err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, found.loads, expected.loads)
    for name in (name for name in expected.weights if name.endswith(".balance")):
        np.testing.assert_array_equal(found.weights[name], expected.weights[name], err_msg=name)
    pairs = list(zip(found.metrics, expected.metrics, strict=True))
    assert all(one["loss_weight"] == other["loss_weight"] for one, other in pairs)
    worst = {name: max(abs(one[name] / other[name] - 1) for one, other in pairs) for name in ("loss", "grad_norm")}
    for figure in ("gradients", "weights"):
        arrays = getattr(found, figure)
        # The bias that balances experts is no weight that a gradient moves: it must be the same, to the bit.
        wanted = {name: x for name, x in getattr(expected, figure).items() if not name.endswith(".balance")}
        begin = {name: expected.initial[name.split(".", 1)[1]] if figure == "weights" else 0.0 for name in wanted}
        # Behind an output that starts at zero no gradient arrives yet.
        moved = {name: x for name, x in wanted.items() if np.any(x != begin[name])}
        errors = [np.linalg.norm(arrays[n] - x) / np.linalg.norm(x - begin[n]) for n, x in moved.items()]
        worst[figure] = float(max(errors))
    return worst


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    worst: dict[str, dict[str, float]] = {}
    cases = [(d, config_for(compute_dtype=d), config_for(compute_dtype=d), AXES + MIXED) for d in list(BOUNDS)[:2]]
    for dtype in ("float8", "int8"):
        cases += [("8 bits", config_for(matmul_dtype=dtype), config_for(matmul_dtype=dtype), AXES + MIXED)]
    cases += [("every floor", config_for(**f), config_for(2, **f), MIXED[:1]) for f in FAMILIES.values()]
    for fields in ROUTERS.values():
        alone = config_for(rows=32, **fields)
        cases += [("experts", alone, config_for(parts, 32, **fields), EXPERT_MESHES) for parts in (1, 4)]
    for kind, alone, config, shapes in cases:
        expected = three_steps(alone, {})
        for shape in shapes:
            figures = differences(three_steps(config, shape), expected)
            found = {name: figures[name] for name in BOUNDS[kind]}
            print(f"{kind:12}{shape!s:45}", *(f"{name} {value:.1e}" for name, value in found.items()), flush=True)
            worst[kind] = {name: max(value, worst.get(kind, {}).get(name, 0)) for name, value in found.items()}
    for kind, found in worst.items():
        print(f"{kind:12}", *(f"{name} {found[name]:.1e} of {bound:.0e}" for name, bound in BOUNDS[kind].items()))
    print(json.dumps({"jax": jax.__version__, "worst": worst, "bounds": BOUNDS}))


if __name__ == "__main__":
    main()
