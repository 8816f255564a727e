"""A model in the names and layouts of Hugging Face Transformers, in both directions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from model.config import UNEMBEDDING_FIELDS, ModelConfig, ResolvedModelConfig
from model.interchange.config_keys import parse
from model.interchange.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from model.interchange.experts import GLM4_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from model.interchange.family import Family
from model.interchange.gemma import GEMMA, GEMMA2, GEMMA3
from model.interchange.gpt import GPT1, GPT2
from model.interchange.gpt_oss import GPT_OSS
from model.interchange.layernorm import COHERE2, GPT_NEOX, STABLELM, STARCODER2
from model.interchange.llama import GLM4, GRANITE, LLAMA, MINISTRAL, MISTRAL, PHI3, QWEN2, QWEN3, SMOLLM3
from model.interchange.olmo import OLMO2, OLMO3
from model.interchange.quantized import check_quantization
from model.interchange.tensors import ParameterReader, TensorMap, TensorReader, torch_linear
from model.parameters import parameter_table
from model.position import sinusoids
from settings import choices_of

# A model is exported to the first that has all of its choices. Gemma comes before Llama, because some models fit both
# and only Gemma names all of their choices.
FAMILIES = (
    *(GEMMA, LLAMA, MISTRAL, QWEN3, GPT2, GPT1, QWEN2, MINISTRAL, SMOLLM3, PHI3, GRANITE, GLM4, OLMO2, OLMO3),
    *(GEMMA2, GEMMA3, GPT_NEOX, STABLELM, STARCODER2, COHERE2, DEEPSEEK_V3, DEEPSEEK_V2),
    *(MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GLM4_MOE, GPT_OSS),
)
# The key in config.json for fields that widening changes.
OWN_KEY = "ziggurat"
OWN_FIELDS = (
    *("position", "attention_bias", "attention_output_bias", "feedforward_bias", "norm_bias", "norm_offset"),
    *("scale_embeddings", "tie_embeddings", "balance_bias", "router_bias", "feedforward_dim"),
)
# What else it may hold: the context, where config.json gives the model another number of positions.
OWN_CONTEXT = "segment_length"
# The head of a reward model, and the config keys for its number of scores.
SCORE = torch_linear("score.weight", "unembedding.head")
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# Values of config keys that an import must have in every class.
REQUIRED = {"is_causal": True}
# Relative rounding error of a bfloat16 file.
BFLOAT16_RTOL = 2**-7


def family_of(config: ResolvedModelConfig) -> Family:
    """Returns the class of Transformers with this model's choices. ValueError names what the nearest ones lack."""
    if config.export_as is not None:
        family = next(family for family in FAMILIES if family.model_type == config.export_as)
        if missing := family.lacks(config):
            named = f"model.export_as = {config.export_as}: {family.architecture} in Transformers"
            raise ValueError(f"{named} has no {', no '.join(missing)}")
        return family
    lacks = [family.lacks(config) for family in FAMILIES]
    if [] in lacks:
        return FAMILIES[lacks.index([])]
    # A class without experts is never near to a model that has them, nor the other way round.
    experts = f"model.num_experts = {config.num_experts}"
    fewest = min(len(missing) for missing in lacks if experts not in missing)
    nearest: dict[str, str] = {}
    for family, missing in zip(FAMILIES, lacks, strict=True):
        if len(missing) == fewest and experts not in missing:
            nearest.setdefault(f"no {', no '.join(missing)}", family.architecture)
    raise ValueError("; ".join(f"{name} in Transformers has {missing}" for missing, name in nearest.items()))


class Interchange:
    """A model and its class of Transformers: exports its config and tensors, checks and imports others.

    Attributes:
        context: number of positions that the model was trained on at once.
        architecture: name of the class: the family's, or its classifier for a reward model.
        widened: the config with everything that the class always has.
        num_positions: number of positions that config.json gives the model.
        predicted_layers: number of layers behind the last one that a file has and this decoder leaves out.
    """

    def __init__(self, config: ResolvedModelConfig, context: int, predicted_layers: int = 0):
        self.config = config
        self.context = context
        self.predicted_layers = predicted_layers
        self.family = family_of(config)
        self.widened = self.family.widened(config, context)
        self.num_positions = self.widened.max_positions or context
        if config.rope_scaling in ("yarn", "longrope"):
            # Older versions of Transformers take this number, divided by the original one, as the factor.
            assert config.rope_original_context is not None
            self.num_positions = round(config.rope_factor * config.rope_original_context)
        self.architecture, tensors = self.family.architecture, self.family.tensors
        self._last = next(tensor.name for tensor in tensors if tensor.parameters == ("unembedding.matrix",))
        if config.reward_head:
            assert self.family.classifier
            self.architecture, tensors, self._last = self.family.classifier, (*tensors, SCORE), SCORE.name
        self.tensor_map = TensorMap(self.widened, tensors)
        self._own_parameters = parameter_table(config).keys()
        self._embedding_scale = np.float32(math.sqrt(config.model_dim))
        self._folds_scale = self.widened.scale_embeddings != config.scale_embeddings
        # What is added to the weights of norms on export.
        self._norm_offset = np.float32(config.norm_offset - self.widened.norm_offset)

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> "Interchange":
        """Makes the model of a config.json. ValueError names what this decoder does not have."""
        if not isinstance(hf_config, Mapping):
            raise ValueError("config.json holds no settings")
        architectures = hf_config.get("architectures")
        named = ([name for name in (family.architecture, family.classifier) if name] for family in FAMILIES)
        of_families = list(zip(FAMILIES, named, strict=True))
        family = next((family for family, names in of_families if architectures in [[name] for name in names]), None)
        if family is None:
            readable = ", ".join(name for _, names in of_families for name in names)
            raise ValueError(f"architectures is {architectures}; what can be read is {readable}")
        if hf_config.get("model_type", family.model_type) not in (family.model_type, *family.other_types):
            other = hf_config["model_type"]
            raise ValueError(
                f"model_type is {other!r}, of another class than {family.architecture}; correct one of them"
            )
        config = _import_config(family, hf_config, is_reward=architectures == [family.classifier])
        context = parse(hf_config.get(OWN_KEY, {}), OWN_CONTEXT, int, family.context.read(hf_config))
        if not 1 <= context <= (config.max_positions or context):
            most = f" and at most {config.max_positions}" if config.max_positions else ""
            name = OWN_CONTEXT if OWN_CONTEXT in hf_config.get(OWN_KEY, {}) else family.context.key
            raise ValueError(f"{name} is {context}; it must be at least 1{most}")
        key = family.predicted_key
        return cls(config, context, 0 if key is None else max(parse(hf_config, key, int, 1), 0))

    @property
    def own_fields(self) -> dict[str, Any]:
        """Fields in which the model differs from its widened form, and its context if that differs."""
        values = {name: getattr(self.config, name) for name in OWN_FIELDS}
        own = {name: value for name, value in values.items() if value != getattr(self.widened, name)}
        return own | ({OWN_CONTEXT: self.context} if self.context != self.num_positions else {})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every exported tensor by name, in the order of `export_tensors`."""
        return {array.name: self.tensor_map.shape(array.tensor) for array in self.tensor_map.arrays()}

    @property
    def float32_tensors(self) -> frozenset[str]:
        """Names of the tensors that are float32 whatever the dtype of the others."""
        return frozenset(array.name for array in self.tensor_map.arrays() if array.tensor.float32)

    def export_config(self, bos_id: int, eos_id: int, dtype: str = "float32") -> dict[str, Any]:
        """Returns the values of config.json."""
        hf_config = {
            "architectures": [self.architecture],
            "model_type": self.family.model_type,
            **{key.key: key.write(getattr(self.widened, key.field)) for key in self.family.keys},
            self.family.context.key: self.num_positions,
            **self.family.extra_keys(self.widened),
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            # The class's own would otherwise be a token whose embedding it takes for zero.
            "pad_token_id": None,
            "dtype": dtype,
        }
        if self.config.reward_head:
            hf_config |= ONE_LABEL
        return hf_config | ({OWN_KEY: self.own_fields} if self.own_fields else {})

    def export_tensors(self, read: ParameterReader) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, array) for every tensor: the tables, then layer by layer, then the tensors after the layers.

        Each layer of each parameter is read once, when it is needed. One layer of all experts is in memory at most.
        """
        # The experts of a layer are written one after the other.
        widened = functools.lru_cache(maxsize=1)(self.export_reader(read))
        for array in self.tensor_map.arrays():
            yield array.name, self.tensor_map.write(array, widened)

    def export_reader(self, read: ParameterReader) -> ParameterReader:
        """Returns a reader of the widened model's parameters, from one of the model's own."""

        def widened(name: str, layer: int | None) -> np.ndarray:
            if name == "embedding.table" and self._folds_scale:
                return read(name, None) * self._embedding_scale
            if name in self._own_parameters:
                offset = self._offset_of(name)
                return read(name, layer) + offset if offset else read(name, layer)
            return read("embedding.table", None).T if name == "unembedding.matrix" else self._filling(name)

        return widened

    def import_reader(self, read: TensorReader) -> ParameterReader:
        """Returns a reader of our parameters, float32, from tensors that passed `check_tensors`."""

        def parameter(name: str, layer: int | None) -> np.ndarray:
            if name == "embedding.table" and self._folds_scale:
                if self.config.tie_embeddings:
                    return self.tensor_map.read("unembedding.matrix", None, read).T
                return self.tensor_map.read(name, None, read) / self._embedding_scale
            offset = self._offset_of(name)
            array = self.tensor_map.read(name, layer, read)
            return array - offset if offset else array

        return parameter

    def _offset_of(self, name: str) -> np.float32:
        is_norm = self.tensor_map.parameters[name].role == "norm"
        return self._norm_offset if is_norm else np.float32(0)

    def full_names(self, names: Collection[str]) -> dict[str, str]:
        """Maps the name of each tensor in its class to its name in files that may omit the prefix."""
        prefix = "" if any(name.startswith(self.family.prefix) for name in names) else self.family.prefix
        return {name if name == self._last else prefix + name: name for name in names}

    def left_out(self, names: Collection[str]) -> list[str]:
        """Returns the names of tensors in layers behind the last one, which predict further tokens."""
        first = self.config.num_layers
        layers = tuple(f"model.layers.{number}." for number in range(first, first + self.predicted_layers))
        return [name for name in names if name.startswith(layers)]

    def check_tensors(
        self,
        names: Collection[str],
        read: TensorReader,
        shape_of: Callable[[str], tuple[int, ...]] | None = None,
    ) -> None:
        """Raises ValueError if the tensors are not those of this model.

        Args:
            read: returns a tensor or a view of it; a tensor that only widens the model must equal its filling.
            shape_of: returns the shape of a tensor, if reading it takes more than a view.
        """
        if self.config.num_layers > len(names):
            raise ValueError(f"the config says {self.config.num_layers} layers, and there are {len(names)} tensors")
        shapes = self.shapes
        if missing := sorted(shapes.keys() - set(names)):
            raise ValueError(f"there is no {missing[0]}" + (f", nor {len(missing) - 1} others" if missing[1:] else ""))
        for name, shape in shapes.items():
            if (actual := shape_of(name) if shape_of else read(name).shape) != shape:
                raise ValueError(f"{name} has the shape {actual}; the config wants {shape}")
        extra = sorted(set(names) - shapes.keys() - set(self.left_out(names)))
        extra = [name for name in extra if not name.endswith(self.family.ignored)]
        table = functools.cache(lambda: self.tensor_map.read("embedding.table", None, read))
        if self._last in extra and self.widened.tie_embeddings:
            extra.remove(self._last)
            if not np.array_equal(read(self._last), table()[: self.config.vocab_size]):
                raise ValueError(f"{self._last} is not the embedding, and the config says that they are tied")
        if extra:
            others = f", nor for {len(extra) - 1} others" if extra[1:] else ""
            raise ValueError(f"this model has no place for {extra[0]}{others}")
        same = True
        if self.widened.tie_embeddings != self.config.tie_embeddings:
            scaled = self.tensor_map.read("unembedding.matrix", None, read).T * self._embedding_scale
            same = np.allclose(table(), scaled, rtol=BFLOAT16_RTOL, atol=0)
        if not same or not self._holds_fillings(read):
            own = self.own_fields
            raise ValueError(f"{OWN_KEY} in the config is {own}, which the weights are not; leave it out there")

    def _holds_fillings(self, read: TensorReader) -> bool:
        parameters = self.tensor_map.parameters
        for name in parameters.keys() - self._own_parameters - {"unembedding.matrix"}:
            filling = self._filling(name)
            atol = BFLOAT16_RTOL * filling.any()
            for layer in range(axes["layers"]) if "layers" in (axes := parameters[name].axes) else [None]:
                if not np.allclose(self.tensor_map.read(name, layer, read), filling, rtol=0, atol=atol):
                    return False
        return True

    def _filling(self, name: str) -> np.ndarray:
        """Returns one layer of a parameter that only widens the model: fixed positions, or zeros."""
        parameter = self.tensor_map.parameters[name]
        shape = tuple(size for axis, size in parameter.axes.items() if axis != "layers")
        if name == "position.table" and self.config.position == "sinusoidal":
            return np.asarray(sinusoids(jnp.arange(shape[0])[None], shape[1]))[0]
        return np.zeros(shape, np.float32)


def _import_config(family: Family, hf_config: Mapping[str, Any], is_reward: bool) -> ResolvedModelConfig:
    for name, value in {**REQUIRED, **family.required}.items():
        if hf_config.get(name) is not None and hf_config[name] != value:
            raise ValueError(f"{name} is {hf_config[name]!r}; in this decoder it is {value}")
    layer_types = [] if "layer_pattern" in family.limits else hf_config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(layer_type != layer_types[0] for layer_type in layer_types):
        raise ValueError(f"layer_types is {layer_types!r}; in {family.architecture} all layers are alike")
    if settings := hf_config.get("quantization_config"):
        check_quantization(settings, family.quantization)
    fields = {name: values[0] for name, values in family.choices.items() if values and len(values) == 1}
    fields |= family.always
    fields |= {key.field: key.read(hf_config) for key in family.keys}
    fields |= family.extra_fields(hf_config)
    if family.one_width:
        fields["feedforward_dim"] = fields["expert_dim"]
    if layer_types[:1] == ["full_attention"] and fields.get("sliding_window") is not None:
        raise ValueError("layer_types says full_attention in all layers, and there is a sliding_window; leave out one")
    own = hf_config.get(OWN_KEY, {})
    if not isinstance(own, Mapping) or not all(_is_own(name, value) for name, value in own.items()):
        raise ValueError(f"{OWN_KEY} is {own!r}; it may hold {', '.join(OWN_FIELDS)}, {OWN_CONTEXT}")
    fields |= {name: value for name, value in own.items() if name != OWN_CONTEXT}
    if is_reward:
        labels = hf_config.get("id2label")
        if not isinstance(labels, Mapping) or len(labels) != 1:
            raise ValueError(f"id2label is {labels!r}; a reward model has one label, as in {ONE_LABEL['id2label']}")
        fields = {name: value for name, value in fields.items() if name not in UNEMBEDDING_FIELDS}
        fields["reward_head"] = True
    if fields.get("position") == "learned":
        fields["max_positions"] = family.context.read(hf_config)
    config = ResolvedModelConfig(compute_dtype="float32", **fields)
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    config = config.resolved()
    # Another class may have all of the model's choices, in tensors of other names.
    is_first = next((other for other in FAMILIES if not other.lacks(config)), None) is family
    return config if is_first else dataclasses.replace(config, export_as=family.model_type)


def _is_own(name: str, value: Any) -> bool:
    if name in ("position", "feedforward_dim"):
        return value in choices_of(ModelConfig, name) if name == "position" else type(value) is int
    return name == OWN_CONTEXT or (name in OWN_FIELDS and isinstance(value, bool))
