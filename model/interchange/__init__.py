"""Models in the names and layouts of Hugging Face Transformers, both ways: one table a class of theirs.

A class may have what a model does without: biases, which are then written as zeros, and a table of positions, which
then holds fixed ones. Embeddings that are scaled by √D are written scaled where the class does not do it. What the
model itself has stands in config.json under "ziggurat", so that it comes back as it was.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig, ResolvedModelConfig
from model.interchange.family import Family
from model.interchange.gemma import GEMMA
from model.interchange.gpt import GPT1, GPT2
from model.interchange.llama import LLAMA, MISTRAL, QWEN3
from model.interchange.tensors import ParameterReader, TensorMap, Theirs
from model.parameters import parameter_table
from model.position import sinusoids
from model.trees import flattened, nested
from settings import choices_of

# Before Llama stands what only Gemma has a name for.
FAMILIES = (GEMMA, LLAMA, MISTRAL, QWEN3, GPT2, GPT1)
# In config.json: fields of ours that their class has in another way.
OWN = "ziggurat"
OWN_FIELDS = ("position", "attention_bias", "feedforward_bias", "scale_embeddings", "tie_embeddings")
HEAD = "lm_head.weight"
# How far a value may be from another because a file has 16 bits for it.
ROUNDED = 2**-7


def family_of(config: ResolvedModelConfig) -> Family:
    """The class of theirs that has this model's choices. ValueError names those that the nearest ones do not have."""
    lacks = [family.lacks(config) for family in FAMILIES]
    fewest = min(map(len, lacks))
    if not fewest:
        return FAMILIES[lacks.index([])]
    nearest: dict[str, str] = {}
    for family, missing in zip(FAMILIES, lacks, strict=True):
        if len(missing) == fewest:
            nearest.setdefault(f"no {', no '.join(missing)}", family.architecture)
    raise ValueError("; ".join(f"{name} in Transformers has {missing}" for missing, name in nearest.items()))


def config_to_theirs(
    config: ResolvedModelConfig, context: int, bos_id: int, eos_id: int, dtype: str = "float32"
) -> dict[str, Any]:
    """The values of their config.json.

    Args:
        config: resolved.
        context: positions that the model has been trained on at once.
        bos_id: the token before a document.
        eos_id: the token that ends one.
        dtype: of the weights in their files.

    Raises:
        ValueError: as of `family_of`.
    """
    family = family_of(config)
    wide = family.widened(config, context)
    theirs = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        **{setting.theirs: setting.written(getattr(wide, setting.ours)) for setting in family.settings},
        family.context.theirs: wide.max_positions or context,
        **family.more_to(wide),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
    }
    own = _own(config, wide)
    return theirs | ({OWN: own} if own else {})


def shapes_of_theirs(config: ResolvedModelConfig, context: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of theirs by its name, in the order of `to_theirs`."""
    layout = _layout(config, context)
    return {name: layout.shape(tensor) for name, tensor, _ in layout.names()}


def to_theirs(config: ResolvedModelConfig, context: int, read: ParameterReader) -> Iterator[tuple[str, np.ndarray]]:
    """Their (name, array), one at a time: the tables, then layer by layer, then what is after the layers.

    Args:
        config: resolved.
        context: positions that the model has been trained on at once.
        read: gives our parameters; of a layer's each is read once, when it is its turn.
    """
    wide, layout, own = _wide(config, context), _layout(config, context), parameter_table(config)
    folds = wide.scale_embeddings != config.scale_embeddings

    def filled(name: str, layer: int | None) -> np.ndarray:
        if name == "embedding.table" and folds:
            return read(name, None) * np.float32(math.sqrt(config.model_dim))
        if name == "unembedding.matrix" and name not in own:
            return read("embedding.table", None).T
        return read(name, layer) if name in own else _filling(config, layout, name)

    for name, tensor, layer in layout.names():
        yield name, layout.write(tensor, layer, filled)


def reader_of(weights: Mapping[str, Any]) -> ParameterReader:
    """Nested arrays as `to_theirs` takes them."""
    flat = flattened(weights)
    return lambda name, layer: np.asarray(flat[name] if layer is None else flat[name][layer])


def config_from_theirs(theirs: Mapping[str, Any]) -> ResolvedModelConfig:
    """The model of their config.json, resolved. ValueError says what in it our decoder does not have."""
    family = _family_of_theirs(theirs)
    for name, value in family.fixed.items():
        if theirs.get(name) is not None and theirs[name] != value:
            raise ValueError(f"{name} is {theirs[name]!r}; in this decoder it is {value}")
    kinds = theirs.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}; in this decoder all layers are alike")
    if theirs.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not read; take those that they were made of")
    found = {name: values[0] for name, values in family.choices.items() if len(values) == 1} | {**family.always}
    found |= {setting.ours: setting.read(theirs) for setting in family.settings}
    found |= family.more_from(theirs)
    own = theirs.get(OWN, {})
    if not isinstance(own, Mapping) or not all(_is_own(name, value) for name, value in own.items()):
        raise ValueError(f"{OWN} is {own!r}; it may hold {', '.join(OWN_FIELDS)}")
    found |= own
    if found.get("position") == "learned":
        found["max_positions"] = family.context.read(theirs)
    config = ResolvedModelConfig(compute_dtype="float32", **found)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config.resolved()


def context_from_theirs(theirs: Mapping[str, Any]) -> int:
    """The positions that a model of theirs sees at once. ValueError where that is no number."""
    context: int = _family_of_theirs(theirs).context.read(theirs)
    if context < 1:
        raise ValueError(f"{_family_of_theirs(theirs).context.theirs} is {context}; it must be at least 1")
    return context


def reader_from_theirs(config: ResolvedModelConfig, context: int, read: Theirs) -> ParameterReader:
    """Our parameters, float32, one at a time, from their tensors: the inverse of `to_theirs`.

    Their names and shapes are as `check_theirs` wants them.
    """
    wide, layout = _wide(config, context), _layout(config, context)

    def ours(name: str, layer: int | None) -> np.ndarray:
        if name == "embedding.table" and wide.scale_embeddings != config.scale_embeddings:
            if config.tie_embeddings:
                return layout.read("unembedding.matrix", None, read).T
            return layout.read(name, None, read) / np.float32(math.sqrt(config.model_dim))
        return layout.read(name, layer, read)

    return ours


def check_theirs(config: ResolvedModelConfig, context: int, names: Collection[str], read: Theirs) -> None:
    """ValueError where their tensors are not those of this model.

    Args:
        config: resolved.
        context: as their config says.
        names: of all tensors that there are.
        read: gives them, or views of them. What only fills the model up to their class must be no more than that.
    """
    if config.num_layers > len(names):
        raise ValueError(f"the config says {config.num_layers} layers, and there are {len(names)} tensors")
    layout, wide, own = _layout(config, context), _wide(config, context), parameter_table(config)
    wanted = shapes_of_theirs(config, context)
    if missing := sorted(wanted.keys() - set(names)):
        raise ValueError(f"there is no {missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    for name, shape in wanted.items():
        if (found := read(name).shape) != shape:
            raise ValueError(f"{name} has the shape {found}; the config wants {shape}")
    extra = [name for name in sorted(set(names) - wanted.keys()) if not name.endswith(family_of(config).without)]
    table = functools.cache(lambda: layout.read("embedding.table", None, read))
    if HEAD in extra and wide.tie_embeddings:
        extra.remove(HEAD)
        if not np.array_equal(read(HEAD), table()[: config.vocab_size]):
            raise ValueError(f"{HEAD} is not the embedding, and the config says that they are tied")
    if extra:
        others = f", nor for {len(extra) - 1} others" if extra[1:] else ""
        raise ValueError(f"this model has no place for {extra[0]}{others}")
    same = True
    if wide.tie_embeddings != config.tie_embeddings:
        scaled = layout.read("unembedding.matrix", None, read).T * np.float32(math.sqrt(config.model_dim))
        same = np.allclose(table(), scaled, rtol=ROUNDED, atol=0)
    for name in layout.parameters.keys() - own.keys() - {"unembedding.matrix"}:
        for layer in range(config.num_layers) if "layers" in layout.parameters[name].axes else [None]:
            filling = _filling(config, layout, name)
            same = same and np.allclose(layout.read(name, layer, read), filling, rtol=0, atol=ROUNDED * filling.any())
    if not same:
        raise ValueError(f"{OWN} in the config is {_own(config, wide)}, which the weights are not; leave it out there")


def full_names(theirs: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """The name that each tensor of theirs has in its class → its name in files that leave the first word out."""
    first = _family_of_theirs(theirs).first
    leaves_out = not any(name.startswith(first) for name in names)
    return {first + name if leaves_out and name != HEAD else name: name for name in names}


def from_theirs(config: ResolvedModelConfig, context: int, read: Theirs) -> dict[str, Any]:
    """Their tensors, got by name, → nested float32 weights."""
    return stacked(config, reader_from_theirs(config, context, read))


def stacked(config: ResolvedModelConfig, read: ParameterReader) -> dict[str, Any]:
    """All parameters that a reader gives, as nested arrays: the inverse of `reader_of`."""
    weights = {}
    for name, parameter in parameter_table(config).items():
        if "layers" not in parameter.axes:
            weights[name] = read(name, None)
            continue
        weights[name] = np.empty(parameter.shape, np.float32)
        for layer in range(config.num_layers):
            weights[name][layer] = read(name, layer)
    return nested(weights)


def _wide(config: ResolvedModelConfig, context: int) -> ResolvedModelConfig:
    return family_of(config).widened(config, context)


def _layout(config: ResolvedModelConfig, context: int) -> TensorMap:
    return TensorMap(_wide(config, context), family_of(config).tensors)


def _filling(config: ResolvedModelConfig, layout: TensorMap, name: str) -> np.ndarray:
    """What a parameter that the model does without is: fixed positions, or zeros."""
    parameter = layout.parameters[name]
    shape = tuple(size for axis, size in parameter.axes.items() if axis != "layers")
    if name == "position.table" and config.position == "sinusoidal":
        return np.asarray(sinusoids(jnp.arange(shape[0])[None], shape[1]))[0]
    return np.zeros(shape, np.float32)


def _family_of_theirs(theirs: Mapping[str, Any]) -> Family:
    if not isinstance(theirs, Mapping):
        raise ValueError("config.json holds no settings")
    named = theirs.get("architectures")
    found = next((family for family in FAMILIES if named == [family.architecture]), None)
    if found is None:
        readable = ", ".join(family.architecture for family in FAMILIES)
        raise ValueError(f"architectures is {named}; what can be read is {readable}")
    return found


def _is_own(name: str, value: Any) -> bool:
    return name in OWN_FIELDS and (
        value in choices_of(ModelConfig, "position") if name == "position" else isinstance(value, bool)
    )


def _own(config: ResolvedModelConfig, wide: ResolvedModelConfig) -> dict[str, Any]:
    """The fields in which a model is another than its class of theirs."""
    return {name: getattr(config, name) for name in OWN_FIELDS if getattr(config, name) != getattr(wide, name)}
