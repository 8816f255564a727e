"""Folders of weights with experts: the balance bias keeps its bits in any dtype, and quantized files are opened."""

import json
import logging
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer.training import train_tokenizer
from model.interchange.tensors import reader_of
from model.parameters import parameter_table
from model.trees import flattened, nested
from tests.data.texts import code
from tests.small import small_model
from train.weights.huggingface import open_huggingface, open_tensors, write_huggingface
from train.weights.safetensors_files import TensorFiles, write_tensor_files
from train.weights.weight_source import WeightSource

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
LATENT = {"num_kv_heads": 4, "kv_latent_dim": 16, "head_dim": 12, "rope_dim": 4, "value_dim": 8, "norm_epsilon": 1e-6}
EXPERTS = {"num_experts": 4, "expert_dim": 16, "shared_expert_dim": 16, "dense_layers": 1}
BALANCED = {"router_score": "sigmoid", "balance_bias": True}


@pytest.fixture
def source(tmp_path: Path) -> WeightSource:
    tokenizer = train_tokenizer(code()[:10], 600, tmp_path / "tokenizer")
    config = small_model(**LATENT, **EXPERTS, **BALANCED, vocab_size=tokenizer.vocab_size)
    random = np.random.default_rng(0)
    drawn = {name: random.normal(0, 1, p.shape).astype(np.float32) for name, p in parameter_table(config).items()}
    return WeightSource(config, 32, tokenizer, reader_of(nested(drawn)))


def test_the_balance_bias_is_float32_in_an_export_of_another_dtype(source: WeightSource, tmp_path: Path):
    write_huggingface(tmp_path / "weights", source, "bfloat16")
    files = TensorFiles(tmp_path / "weights")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {name for name in files.names if files(name).dtype == np.float32} == {name}
    again = flattened(open_huggingface(tmp_path / "weights").in_memory())
    before = flattened(source.in_memory())
    assert np.array_equal(again["blocks.experts.balance"], before["blocks.experts.balance"])
    rounded = before["blocks.experts.down"].astype(jnp.bfloat16).astype(np.float32)
    assert np.array_equal(again["blocks.experts.down"], rounded)


def test_an_export_reads_each_layer_of_experts_once(source: WeightSource):
    reads: Counter[tuple[str, int | None]] = Counter()

    def counted(name: str, layer: int | None) -> np.ndarray:
        reads[name, layer] += 1
        return source.read(name, layer)

    names = [name for name, _ in source.interchange().export_tensors(counted)]
    assert sum(".experts." in name for name in names) == 3 * 4
    assert set(reads.values()) == {1}


def test_a_quantized_folder_opens_and_says_which_tensors_it_leaves_out(source: WeightSource, tmp_path: Path, caplog):
    folder = tmp_path / "weights"
    write_huggingface(folder, source)
    files = TensorFiles(folder)
    tensors = {name: np.array(files(name)) for name in files.names}
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    scale = np.array([[0.5]], np.float32)
    tensors[f"{name}_scale_inv"] = scale
    tensors["model.layers.2.eh_proj.weight"] = scale
    shapes = {name: array.shape for name, array in tensors.items()}
    tensors[name] = tensors[name].astype(jnp.float8_e4m3fn).astype(np.float32)
    write_tensor_files(folder, shapes, np.dtype(np.float32), tensors.items())
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": FP8, "model_type": "kimi_k2"}))
    with caplog.at_level(logging.WARNING):
        model, read = open_tensors(folder)
    assert "tensors of layers that predict further tokens, left out: 1" in caplog.text
    found = read("blocks.experts.gate_up", 0)
    assert np.array_equal(found[3, :, 1], tensors[name].T * 0.5)
    assert np.array_equal(found[2], source.read("blocks.experts.gate_up", 0)[2])
    assert model.family.model_type == "deepseek_v3"
