"""Quantized weights are read as the float32 values that they stand for, next to a reference and Transformers."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from model.interchange.huggingface import Interchange
from model.interchange.quantized import StoredTensors, rescaled, unpacked
from model.interchange.tensors import nested_weights, reader_of
from model.trees import flattened
from tests.model.interchange.test_families import KV, LATENT_EXPERTS, OTHERS, SIZES
from tests.peers import require

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
DIGITS = {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 3.0, 6: 4.0, 7: 6.0}


def packed(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks and scales of matrices [E, outputs, inputs]."""
    random = np.random.default_rng(seed)
    *rows, inputs = shape
    blocks = random.integers(0, 256, (*rows, inputs // 32, 16), dtype=np.uint8)
    return blocks, random.integers(118, 127, (*rows, inputs // 32), dtype=np.uint8)


def by_hand(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Value by value, as the format has it: [E, inputs, outputs]."""
    E, rows, groups, _ = blocks.shape
    values = np.zeros((E, groups * 32, rows))
    for e, row, group, place in np.ndindex(E, rows, groups, 32):
        byte = int(blocks[e, row, group, place // 2])
        digit = byte >> 4 if place % 2 else byte & 15
        sign = -1 if digit & 8 else 1
        values[e, 32 * group + place, row] = sign * DIGITS[digit & 7] * 2.0 ** (int(scales[e, row, group]) - 127)
    return values


def test_packed_values_are_those_of_their_four_bits_and_their_blocks_exponent():
    blocks, scales = packed(0, (2, 3, 64))
    np.testing.assert_array_equal(unpacked(blocks, scales), by_hand(blocks, scales))
    torch, theirs = require("torch"), require("transformers.integrations.mxfp4")
    converted = theirs.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    np.testing.assert_array_equal(unpacked(blocks, scales), converted.numpy())


def test_a_blocks_values_are_multiplied_by_its_scale_the_last_blocks_may_be_smaller():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(40, 50)).astype(jnp.float8_e4m3fn)
    scales = random.uniform(0.5, 2, (3, 4)).astype(np.float32)
    expected = np.array(
        [[np.float32(matrix[i, j]) * scales[i // 16, j // 16] for j in range(50)] for i in range(40)], np.float32
    )
    np.testing.assert_array_equal(rescaled(matrix, scales, (16, 16)), expected)
    torch, theirs = require("torch"), require("transformers.integrations.finegrained_fp8")
    whole = torch.tensor(matrix[:32, :48].astype(np.float32)).to(torch.float8_e4m3fn)
    converted = theirs.Fp8Dequantize(None)._dequantize_one(whole, torch.tensor(scales[:2, :3]), torch.float32)
    np.testing.assert_array_equal(rescaled(matrix[:32, :48], scales[:2, :3], (16, 16)), converted.numpy())


def stored(model_type: str, sizes: dict[str, Any], settings: dict[str, Any]) -> tuple[Interchange, dict[str, Any]]:
    """A model of a quantized file, and random tensors in the shapes that it has without quantization."""
    values = require("transformers").AutoConfig.for_model(model_type, **{**SIZES, **KV, **OTHERS, **sizes}).to_dict()
    architecture = {"gpt_oss": "GptOssForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}[model_type]
    model = Interchange.from_config(values | {"architectures": [architecture], "quantization_config": settings})
    random = np.random.default_rng(0)
    return model, {name: random.normal(size=shape).astype(np.float32) for name, shape in model.shapes.items()}


def read_all(model: Interchange, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors of a file as the model reads them and would write them."""
    opened = StoredTensors(settings, tensors, tensors.__getitem__)
    model.check_tensors(opened.names, opened, opened.shape)
    weights = nested_weights(model.config, model.import_reader(opened))
    assert all(array.dtype == np.float32 for array in flattened(weights).values())
    return dict(model.export_tensors(reader_of(weights)))


def test_a_file_of_gpt_oss_has_packed_experts():
    model, tensors = stored("gpt_oss", {"num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 64}, MXFP4)
    quantized = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inputs, outputs = quantized.pop(name).shape
        blocks, scales = packed(len(name), (E, outputs, inputs))
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = by_hand(blocks, scales).astype(np.float32)
    found = read_all(model, MXFP4, quantized)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert np.array_equal(array, tensors[name]), name
    quantized["model.layers.0.mlp.experts.down_proj_scales"] = np.zeros((4, 3, 2), np.uint8)
    with pytest.raises(ValueError, match=r"down_proj_scales does not fit model.layers.0.mlp.experts.down_proj_blocks"):
        read_all(model, MXFP4, quantized)


def test_a_file_of_deepseek_has_scales_of_blocks_and_a_layer_that_is_left_out():
    model, tensors = stored("deepseek_v3", LATENT_EXPERTS, FP8)
    quantized = dict(tensors)
    random = np.random.default_rng(1)
    for name in [name for name in tensors if "proj" in name]:
        matrix = quantized[name].astype(jnp.float8_e4m3fn)
        scales = random.uniform(0.5, 2, [-(-size // 16) for size in matrix.shape]).astype(np.float32)
        quantized |= {name: matrix, f"{name}_scale_inv": scales}
        tensors[name] = rescaled(matrix, scales, (16, 16))
    further = {"model.layers.2.eh_proj.weight": np.ones((32, 64), np.float32)}
    assert model.left_out([*quantized, *further]) == list(further)
    found = read_all(model, FP8, quantized | further)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert np.array_equal(array, tensors[name]), name
    with pytest.raises(ValueError, match=r"no place for model.layers.3.eh_proj.weight"):
        read_all(model, FP8, quantized | {"model.layers.3.eh_proj.weight": np.ones((32, 64), np.float32)})
    scale = quantized.pop("model.layers.0.mlp.up_proj.weight_scale_inv")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight is quantized, and there is no .*_scale_inv"):
        read_all(model, FP8, quantized)
    with pytest.raises(ValueError, match=r"_scale_inv has the shape \(1, 2\); its blocks want \(3, 2\)"):
        read_all(model, FP8, quantized | {"model.layers.0.mlp.up_proj.weight_scale_inv": scale[:1]})


@pytest.mark.parametrize(
    ("model_type", "settings", "words"),
    [
        ("gpt_oss", FP8, "quantization_config: quantized weights are not read"),
        ("deepseek_v3", MXFP4, "quantization_config: quantized weights are not read"),
        ("deepseek_v3", FP8 | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        ("deepseek_v3", FP8 | {"weight_block_size": None}, "quantization_config.weight_block_size is None"),
        ("deepseek_v3", FP8 | {"weight_block_size": [16]}, "quantization_config.weight_block_size is [16]"),
        ("deepseek_v3", FP8 | {"bits": 8}, "quantization_config.bits"),
    ],
)
def test_weights_that_are_quantized_in_another_way_are_refused_by_name(model_type: str, settings: dict, words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        stored(model_type, LATENT_EXPERTS if model_type == "deepseek_v3" else {}, settings)
