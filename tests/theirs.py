"""Our weights as the tensors of independent implementations, and those implementations themselves, for parity tests.

The map of weights is linear and one to one, so gradients go through it too.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.decoder import Decoder
from model.interchange.huggingface import Interchange
from model.interchange.tensors import reader_of
from tests.peers import require
from tests.small import small_model
from train.devices.mesh import one_device_mesh
from train.weights.load import load_trained

CONTEXT = 16
GPT = {
    "position": "learned",
    "max_positions": CONTEXT,
    "activation": "gelu_tanh",
    "gated": False,
    "num_kv_heads": 4,
    "attention_bias": True,
    "feedforward_bias": True,
    "norm": "layernorm",
    "feedforward_dim": 128,
    "tie_embeddings": True,
}
MODELS = {
    "llama": small_model(),
    "qwen3": small_model(qk_norm=True, tie_embeddings=True, head_dim=16),
    "gpt2": small_model(**GPT),
    "post-norm": small_model(**GPT, norm_placement="post"),
    "vaswani": small_model(
        **GPT | {"position": "sinusoidal", "max_positions": None, "activation": "relu", "attention_bias": False},
        norm_placement="post",
    ),
}
# A model of scores, and all models that `load` knows.
REWARD = small_model(num_layers=1, reward_head=True, loss_chunk=None)
ALL = MODELS | {"reward": REWARD}
# Of the original transformer, whose positions are not trained and whose attention has no biases.
FIXED = ("positions_embed.weight", "attn.c_attn.bias", "attn.c_proj.bias")


def build(name: str) -> Any:
    """Transformers' model of this name."""
    transformers = require("transformers")
    values = Interchange(ALL[name], CONTEXT).export_config(bos_id=0, eos_id=0)
    classes = {False: transformers.AutoModelForCausalLM, True: transformers.AutoModelForSequenceClassification}
    return classes[ALL[name].reward_head].from_config(transformers.AutoConfig.for_model(**values))


def tensors(name: str, weights: Any) -> dict[str, np.ndarray]:
    """Nested weights, or their gradients, under Transformers' names and in its layouts."""
    return dict(Interchange(ALL[name], CONTEXT).export_tensors(reader_of(weights)))


def load(name: str, weights: Any) -> tuple[Any, dict[str, Any]]:
    """(Transformers' model with these weights, its parameters that are trained, by name)."""
    torch, model, values = require("torch"), build(name), tensors(name, weights)
    parameters = dict(model.named_parameters())
    assert values.keys() == parameters.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.tensor(values[key]))
    # What our model does not have is fixed there, or zero.
    fixed = FIXED if name == "vaswani" else ()
    return model, {key: parameter for key, parameter in parameters.items() if not key.endswith(fixed)}


def assert_same_logits(run: Path, folder: Path) -> None:
    """A run, or its import, computes what Transformers does with the weights in a folder, to 1e-4."""
    torch, transformers = require("torch"), require("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(str(run))

    @jax.jit
    def logits(weights: dict) -> jax.Array:
        decoder = Decoder(trained.config.model, weights)
        return decoder.logits(
            decoder(jnp.array(tokens), jnp.tile(jnp.arange(24), (2, 1)), jnp.ones((2, 24), jnp.int32))
        )

    found = logits(jax.tree.map(jnp.asarray, jax.device_get(trained.weights)))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(found[..., : model.config.vocab_size] - expected).max() <= 1e-4
