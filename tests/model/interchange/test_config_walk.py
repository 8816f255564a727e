"""Every setting of every class's config.json is read, refused, or without effect on logits."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from model.interchange.config_keys import WITHOUT_EFFECT
from model.interchange.family import Family
from model.interchange.huggingface import FAMILIES, Interchange
from model.interchange.llama import LLAMA
from tests.model.interchange.test_families import (
    CASES,
    FOUR,
    FULL,
    GPT,
    KV,
    LATENT_EXPERTS,
    LLAMA3,
    OTHERS,
    SIZES,
    WINDOW,
    YARN,
)
from tests.peers import require

# What makes settings count that have no effect otherwise, by class.
ACTIVE: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "gpt2": GPT,
    "openai-gpt": GPT,
    "ministral": {"sliding_window": 5, "head_dim": 8, "layer_types": [FULL, WINDOW, WINDOW, FULL]},
}
ACTIVE |= {"deepseek_v3": LATENT_EXPERTS, "deepseek_v2": LATENT_EXPERTS | {"topk_method": "group_limited_greedy"}}
ACTIVE |= {name: CASES[name][-1] for name in ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "glm4_moe", "gpt_oss")}
WINDOWED = ("mistral", "phi3", "starcoder2", "olmo3", "gemma2", "gemma3_text", "cohere2")
ACTIVE |= {name: {"sliding_window": 5} for name in WINDOWED}
WHOLE_YARN = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(YARN["factor"]) + 1}
BASES = [(family, ACTIVE.get(family.model_type, {})) for family in FAMILIES]
BASES += [(LLAMA, {"rope_parameters": rope}) for rope in (WHOLE_YARN, LLAMA3)]
# Keys that count where another one is missing.
SHADOWS = {"max_window_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers"}
# A forward pass of Transformers 5 fails where this is false.
BREAKS = "return_dict"
# Another value for a null, for a name, and else for a value of its type.
NULLS = {"dtype": "float32", "problem_type": "regression", "summary_activation": "tanh"}
NULLS |= {"use_bidirectional_attention": True}
NAMES = {FULL: WINDOW, WINDOW: FULL, "default": "linear", "llama3": "yarn", "yarn": "linear"}


def another(key: str, value: Any) -> Any:
    """Returns a plausible other value of a setting."""
    match value:
        case None:
            return NULLS.get(key, 3)
        case bool():
            return not value
        case int():
            return {"no_rope_layers": 1 - value}.get(key, value + 2)
        case float():
            return value * 2 or 0.25
        case str():
            return NAMES.get(value, "relu")
        case list():
            return [another(key, value[0]), *value[1:]]
    return {}


def settings_of(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yields the path of every setting, those within tables of rotary settings included."""
    for key, value in values.items():
        if isinstance(value, dict) and key in ("rope_parameters", FULL, WINDOW):
            yield from ((key, *path) for path in settings_of(value))
        else:
            yield (key,)


def changed(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    values = deepcopy(values)
    values.pop(SHADOWS.get(path[-1], ""), None)
    table = values
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = another(path[-1], table[path[-1]])
    return values


def ours(values: dict[str, Any]) -> Any:
    """Returns the model that we read, or None where it is refused."""
    try:
        interchange = Interchange.from_config(values)
    except ValueError:
        return None
    return interchange.config, interchange.context


def logits_of(values: dict[str, Any], weights: Any = None) -> tuple[np.ndarray, Any]:
    torch, transformers = require("torch"), require("transformers")
    config = transformers.AutoConfig.for_model(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if weights is not None:
        model.load_state_dict(weights)
    with torch.no_grad():
        tokens = torch.arange(48).reshape(2, 24)
        return model(tokens).logits.numpy(), model.state_dict()


@pytest.mark.parametrize(("family", "active"), BASES, ids=lambda value: getattr(value, "model_type", ""))
def test_a_setting_is_read_or_refused_or_changes_nothing(family: Family, active: dict[str, Any]):
    sizes = OTHERS | (active if "n_embd" in active else SIZES | FOUR | ({} if family.model_type == "gpt_neox" else KV))
    theirs = require("transformers").AutoConfig.for_model(family.model_type, **{**sizes, **active})
    # Every class takes `is_causal`, which no config has by default.
    base = theirs.to_dict() | {"architectures": [family.architecture], "is_causal": True}
    assert ours(base) is not None
    without_effect = WITHOUT_EFFECT | set(family.without_effect)
    assert set(family.without_effect) <= base.keys()
    unread = set()
    for path in settings_of(base):
        before = {key: value for key, value in base.items() if key != SHADOWS.get(path[-1])}
        if ours(changed(base, path)) == ours(before):
            unread.add(".".join(path))
    assert unread ^ (without_effect & base.keys()) == set(), "settings on one side only: not read, and listed"

    values = base | {key: another(key, base[key]) for key in unread - {BREAKS}}
    logits, weights = logits_of(base)
    # On some processors the rounding of a product depends on where its arrays lie in memory.
    np.testing.assert_allclose(logits_of(values, weights)[0], logits, rtol=0, atol=1e-6)
