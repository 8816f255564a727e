"""Models in the names and layouts of Hugging Face Transformers, in both directions: one table for each class.

May import `settings` and the modules of `model`.

- family: one class of Transformers (`family.Family`), with its config keys, tensors and choices.
- widened: a model with everything that its class always has. Biases that the model does without are written as zeros,
  and fixed positions as a table. Embeddings scaled by √D are written scaled if the class does not scale them.
- own fields: fields of the model that widening changes; config.json holds them under "ziggurat", so that an import
  gives the same model.
- hf_config: the values of a config.json.
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
from model.interchange.tensors import ParameterReader, TensorMap, TensorReader
from model.parameters import parameter_table
from model.position import sinusoids
from model.trees import flattened, nested
from settings import choices_of

# Gemma comes before Llama, because some models fit both and only Gemma names all of their choices.
FAMILIES = (GEMMA, LLAMA, MISTRAL, QWEN3, GPT2, GPT1)
# The key in config.json for fields that widening changes.
OWN_KEY = "ziggurat"
OWN_FIELDS = ("position", "attention_bias", "feedforward_bias", "scale_embeddings", "tie_embeddings")
HEAD_TENSOR = "lm_head.weight"
# Relative rounding error of a bfloat16 file.
BFLOAT16_RTOL = 2**-7


def family_of(config: ResolvedModelConfig) -> Family:
    """Returns the class of Transformers with this model's choices. ValueError names what the nearest ones lack."""
    lacks = [family.lacks(config) for family in FAMILIES]
    fewest = min(map(len, lacks))
    if not fewest:
        return FAMILIES[lacks.index([])]
    nearest: dict[str, str] = {}
    for family, missing in zip(FAMILIES, lacks, strict=True):
        if len(missing) == fewest:
            nearest.setdefault(f"no {', no '.join(missing)}", family.architecture)
    raise ValueError("; ".join(f"{name} in Transformers has {missing}" for missing, name in nearest.items()))


def export_config(
    config: ResolvedModelConfig, context: int, bos_id: int, eos_id: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Returns the values of config.json.

    Raises:
        ValueError: as `family_of`.
    """
    family = family_of(config)
    wide = family.widened(config, context)
    hf_config = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        **{key.key: key.written(getattr(wide, key.field)) for key in family.keys},
        family.context.key: wide.max_positions or context,
        **family.more_to(wide),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "dtype": dtype,
    }
    own = _own(config, wide)
    return hf_config | ({OWN_KEY: own} if own else {})


def exported_shapes(config: ResolvedModelConfig, context: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every exported tensor by name, in the order of `export_tensors`."""
    layout = _layout(config, context)
    return {name: layout.shape(tensor) for name, tensor, _ in layout.names()}


def export_tensors(
    config: ResolvedModelConfig, context: int, read: ParameterReader
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array) for every tensor: the tables, then layer by layer, then the tensors after the layers.

    Args:
        read: returns our parameters; each layer of each is read once, when it is needed.
    """
    wide = _wide(config, context)
    layout = _layout(config, context)
    own = parameter_table(config)
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
    """Returns a reader of nested arrays."""
    flat = flattened(weights)
    return lambda name, layer: np.asarray(flat[name] if layer is None else flat[name][layer])


def import_config(hf_config: Mapping[str, Any]) -> ResolvedModelConfig:
    """Returns the resolved model of a config.json. ValueError names what this decoder does not have."""
    family = _family_named(hf_config)
    for name, value in family.fixed.items():
        if hf_config.get(name) is not None and hf_config[name] != value:
            raise ValueError(f"{name} is {hf_config[name]!r}; in this decoder it is {value}")
    kinds = hf_config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}; in this decoder all layers are alike")
    if hf_config.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not read; take those that they were made of")
    fields = {name: values[0] for name, values in family.choices.items() if len(values) == 1} | {**family.always}
    fields |= {key.field: key.read(hf_config) for key in family.keys}
    fields |= family.more_from(hf_config)
    own = hf_config.get(OWN_KEY, {})
    if not isinstance(own, Mapping) or not all(_is_own(name, value) for name, value in own.items()):
        raise ValueError(f"{OWN_KEY} is {own!r}; it may hold {', '.join(OWN_FIELDS)}")
    fields |= own
    if fields.get("position") == "learned":
        fields["max_positions"] = family.context.read(hf_config)
    config = ResolvedModelConfig(compute_dtype="float32", **fields)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    return config.resolved()


def import_context(hf_config: Mapping[str, Any]) -> int:
    """Returns the number of positions that a model sees at once. ValueError if it is not a number."""
    context: int = _family_named(hf_config).context.read(hf_config)
    if context < 1:
        raise ValueError(f"{_family_named(hf_config).context.key} is {context}; it must be at least 1")
    return context


def import_reader(config: ResolvedModelConfig, context: int, read: TensorReader) -> ParameterReader:
    """Returns a reader of our parameters, float32, from their tensors: the inverse of `export_tensors`.

    Names and shapes must have passed `check_imported`.
    """
    wide = _wide(config, context)
    layout = _layout(config, context)

    def parameter(name: str, layer: int | None) -> np.ndarray:
        if name == "embedding.table" and wide.scale_embeddings != config.scale_embeddings:
            if config.tie_embeddings:
                return layout.read("unembedding.matrix", None, read).T
            return layout.read(name, None, read) / np.float32(math.sqrt(config.model_dim))
        return layout.read(name, layer, read)

    return parameter


def check_imported(config: ResolvedModelConfig, context: int, names: Collection[str], read: TensorReader) -> None:
    """Raises ValueError if the tensors are not those of this model.

    Args:
        context: number of positions, from config.json.
        read: returns a tensor or a view of it. Tensors that only widen the model must hold nothing else.
    """
    if config.num_layers > len(names):
        raise ValueError(f"the config says {config.num_layers} layers, and there are {len(names)} tensors")
    layout = _layout(config, context)
    wide = _wide(config, context)
    own = parameter_table(config)
    wanted = exported_shapes(config, context)
    if missing := sorted(wanted.keys() - set(names)):
        raise ValueError(f"there is no {missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
    for name, shape in wanted.items():
        actual = read(name).shape
        if actual != shape:
            raise ValueError(f"{name} has the shape {actual}; the config wants {shape}")
    extra = [name for name in sorted(set(names) - wanted.keys()) if not name.endswith(family_of(config).without)]
    table = functools.cache(lambda: layout.read("embedding.table", None, read))
    if HEAD_TENSOR in extra and wide.tie_embeddings:
        extra.remove(HEAD_TENSOR)
        if not np.array_equal(read(HEAD_TENSOR), table()[: config.vocab_size]):
            raise ValueError(f"{HEAD_TENSOR} is not the embedding, and the config says that they are tied")
    if extra:
        others = f", nor for {len(extra) - 1} others" if extra[1:] else ""
        raise ValueError(f"this model has no place for {extra[0]}{others}")
    same = True
    if wide.tie_embeddings != config.tie_embeddings:
        scaled = layout.read("unembedding.matrix", None, read).T * np.float32(math.sqrt(config.model_dim))
        same = np.allclose(table(), scaled, rtol=BFLOAT16_RTOL, atol=0)
    for name in layout.parameters.keys() - own.keys() - {"unembedding.matrix"}:
        for layer in range(config.num_layers) if "layers" in layout.parameters[name].axes else [None]:
            filling = _filling(config, layout, name)
            same = same and np.allclose(
                layout.read(name, layer, read), filling, rtol=0, atol=BFLOAT16_RTOL * filling.any()
            )
    if not same:
        raise ValueError(
            f"{OWN_KEY} in the config is {_own(config, wide)}, which the weights are not; leave it out there"
        )


def full_names(hf_config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Maps the name of each tensor in its class to its name in files that may omit the first word."""
    first = _family_named(hf_config).first
    leaves_out = not any(name.startswith(first) for name in names)
    return {first + name if leaves_out and name != HEAD_TENSOR else name: name for name in names}


def import_tensors(config: ResolvedModelConfig, context: int, read: TensorReader) -> dict[str, Any]:
    """Returns nested float32 weights from tensors by name."""
    return nested_weights(config, import_reader(config, context, read))


def nested_weights(config: ResolvedModelConfig, read: ParameterReader) -> dict[str, Any]:
    """Returns all parameters of a reader as nested arrays: the inverse of `reader_of`."""
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
    """Returns a parameter that only widens the model: fixed positions, or zeros."""
    parameter = layout.parameters[name]
    shape = tuple(size for axis, size in parameter.axes.items() if axis != "layers")
    if name == "position.table" and config.position == "sinusoidal":
        return np.asarray(sinusoids(jnp.arange(shape[0])[None], shape[1]))[0]
    return np.zeros(shape, np.float32)


def _family_named(hf_config: Mapping[str, Any]) -> Family:
    if not isinstance(hf_config, Mapping):
        raise ValueError("config.json holds no settings")
    named = hf_config.get("architectures")
    family = next((family for family in FAMILIES if named == [family.architecture]), None)
    if family is None:
        readable = ", ".join(family.architecture for family in FAMILIES)
        raise ValueError(f"architectures is {named}; what can be read is {readable}")
    return family


def _is_own(name: str, value: Any) -> bool:
    return name in OWN_FIELDS and (
        value in choices_of(ModelConfig, "position") if name == "position" else isinstance(value, bool)
    )


def _own(config: ResolvedModelConfig, wide: ResolvedModelConfig) -> dict[str, Any]:
    """Returns the fields in which a model differs from its widened form."""
    return {name: getattr(config, name) for name in OWN_FIELDS if getattr(config, name) != getattr(wide, name)}
