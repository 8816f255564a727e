"""Plans of a small step: figures that agree with each other, with the compiler and with the run itself."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

import model.kernels
from data.errors import InputError
from model.parameters import count_parameters
from tests.peers import require
from train.config.config import Config
from train.config.reading import make_config
from train.devices.hardware import CHIPS, with_usable_memory
from train.devices.mesh import make_mesh
from train.devices.xla import OPTIONS
from train.planning.compilation import Compilation, compile_step
from train.planning.plan import Plan, argument_bytes, budget, make_plan
from train.planning.this_machine import local_chip, measured_step
from train.planning.topology import topology_devices
from train.step.flops import flops_per_token

ROWS, T = 8, 128


def small(**groups: Any) -> Config:
    """Two layers of width 128; what is given changes single fields of a group."""
    values: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2, "model_dim": 128, "num_heads": 2, "feedforward_dim": 256, "vocab_size": 512},
        "data": {"segment_length": T},
        "train": {"batch_size": ROWS, "num_steps": 10},
    }
    for group, fields in groups.items():
        values[group] = values.get(group, {}) | fields
    return make_config(values).resolved()


@pytest.fixture(scope="module")
def on_v5e(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """For four TPUs that are not here."""
    require("libtpu")
    config = small()
    mesh = make_mesh(config, topology_devices("v5e:2x2"))
    return make_plan(config, mesh, CHIPS["v5e"], compile_step(config, mesh), "v5e:2x2", tokens=1e9, price=2.0)


@pytest.fixture(scope="module")
def here() -> tuple[Config, Any, Compilation]:
    """For four of this machine's devices."""
    config = small(train={"ema_decay": 0.9})
    mesh = make_mesh(config, jax.devices()[:4])
    return config, mesh, compile_step(config, mesh)


def check(plan: Plan, config: Config) -> None:
    """What holds for every plan that fits."""
    assert plan.fits
    assert plan.refused is None
    assert plan.notes == []
    given = sum(plan.memory.get(name, 0) for name in ("weights", "optimizer", "average", "batch"))
    # The compiler also counts the step's number, and what it pads.
    assert given < plan.argument_bytes_per_device < 1.5 * given
    assert plan.argument_bytes_per_device < plan.peak_bytes_per_device < plan.memory_bytes_per_device
    assert plan.memory["temporaries"] == plan.peak_bytes_per_device - plan.argument_bytes_per_device
    # The state takes the place of the one that was given, but for the metrics.
    assert 0 <= plan.memory["output"] - plan.memory["aliased"] < 2**14

    assert plan.tokens_per_step == ROWS * T
    assert plan.model_flops_per_device == flops_per_token(config.model, T) * ROWS * T / 4
    assert plan.flops_per_device is not None
    assert plan.model_flops_per_device < plan.flops_per_device < 2 * plan.model_flops_per_device
    assert plan.collective_bytes_per_device == sum(c["bytes"] for c in plan.collectives)
    # Each weight is gathered once, for both passes: in bfloat16, for a CPU in float32. Norms and the embedding are not.
    embedding = 512 * config.model.model_dim
    weights = (count_parameters(config.model) - embedding) * 2
    gathered = sum(c["bytes"] for c in plan.collectives if c["kind"] == "all-gather")
    assert 0.99 * weights < gathered < 2.1 * weights
    assert {axis for c in plan.collectives for axis in c["axes"]} == {"fsdp"}

    assert plan.estimated_step_seconds is not None
    assert plan.estimated_mfu is not None
    assert sum(seconds for _, seconds in plan.breakdown) == pytest.approx(plan.estimated_step_seconds)
    assert plan.breakdown[0][1] == pytest.approx(plan.estimated_mfu * plan.estimated_step_seconds)
    assert plan.tokens_per_second == pytest.approx(ROWS * T / plan.estimated_step_seconds)
    assert plan.lower_seconds > 0
    assert plan.compile_seconds > 0


def test_the_figures_of_a_slice_agree_with_each_other(on_v5e: Plan):
    check(on_v5e, small())
    assert (on_v5e.devices, on_v5e.device_kind, on_v5e.mesh["fsdp"]) == (4, "TPU v5 lite", 4)
    assert on_v5e.attention == "splash (on tpu)"
    assert str(on_v5e.estimated_by).startswith("the compiler's cycles")
    assert on_v5e.memory_bytes_per_device == CHIPS["v5e"].memory_bytes


def test_a_token_budget_is_days_hours_and_dollars(on_v5e: Plan):
    assert budget(864e9, 1e6, 256, 1.5) == (10.0, 10 * 24 * 256, 10 * 24 * 256 * 1.5)
    assert budget(864e9, 1e6, 256, None)[2] is None
    assert on_v5e.days is not None
    assert on_v5e.tokens_per_second is not None
    assert on_v5e.days * 86_400 * on_v5e.tokens_per_second == pytest.approx(1e9)
    assert on_v5e.device_hours == pytest.approx(on_v5e.days * 24 * 4)
    assert on_v5e.cost == pytest.approx(on_v5e.device_hours * 2)


def test_without_a_budget_it_is_the_tokens_of_the_run(here: tuple[Config, Any, Compilation]):
    config, mesh, compilation = here
    assert make_plan(config, mesh, CHIPS["h100"], compilation, "").tokens == 10 * ROWS * T
    train = dataclasses.replace(config.train, batch_ramp_start=4, batch_ramp_steps=5)
    ramp = dataclasses.replace(config, train=train)
    assert make_plan(ramp, mesh, CHIPS["h100"], compilation, "").tokens == (5 * 4 + 5 * 8) * T


def test_a_plan_is_plain_json(on_v5e: Plan):
    found = json.loads(json.dumps(dataclasses.asdict(on_v5e), allow_nan=False))
    assert found["peak_bytes_per_device"] == on_v5e.peak_bytes_per_device
    assert found["collectives"][0].keys() == {"kind", "axes", "dtype", "bytes", "sent_bytes", "count", "seconds"}


def test_a_program_too_large_is_a_plan_with_the_compilers_words():
    require("libtpu")
    config = small(train={"batch_size": 2**22})
    mesh = make_mesh(config, topology_devices("v5e:2x2"))
    compilation = compile_step(config, mesh)
    assert compilation.refused is not None
    plan = make_plan(config, mesh, CHIPS["v5e"], compilation, "v5e:2x2")
    assert not plan.fits
    assert "exceeds available HBM (15.75G)" in str(plan.refused)
    assert plan.peak_bytes_per_device > 2**40
    assert plan.argument_bytes_per_device == sum(argument_bytes(config, mesh).values())
    assert plan.estimated_step_seconds is plan.cost is plan.flops_per_device is None
    assert plan.model_flops_per_device > 0


def test_a_program_that_compiles_but_is_larger_than_the_memory_does_not_fit(here: tuple[Config, Any, Compilation]):
    config, mesh, compilation = here
    needed = make_plan(config, mesh, CHIPS["h100"], compilation, "").peak_bytes_per_device
    for memory, fits in ((needed, True), (needed - 1, False)):
        chip = dataclasses.replace(CHIPS["h100"], memory_bytes=memory)
        plan = make_plan(config, mesh, chip, compilation, "")
        assert plan.fits is fits
        assert plan.estimated_step_seconds


def test_of_a_gpus_memory_jax_takes_a_part(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    assert with_usable_memory(CHIPS["h100"]).memory_bytes == int(0.75 * CHIPS["h100"].memory_bytes)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    assert with_usable_memory(CHIPS["h100"]).memory_bytes == CHIPS["h100"].memory_bytes // 2
    assert with_usable_memory(CHIPS["v5e"]) == CHIPS["v5e"]


def test_on_this_machine_the_estimate_stands_beside_a_measured_step(here: tuple[Config, Any, Compilation]):
    config, mesh, compilation = here
    chip = local_chip(config.model.compute_dtype)
    assert 0 < chip.peak_flops < 1e14
    assert 0 < chip.memory_bandwidth < 1e13
    assert chip.memory_bytes > 2**26
    plan = make_plan(config, mesh, chip, compilation, "this machine")
    check(plan, config)
    assert plan.memory["average"] == plan.memory["weights"]
    assert plan.attention.startswith("plain")
    assert compilation.memory["temp"] + compilation.memory["argument"] <= plan.peak_bytes_per_device
    assert 0 < measured_step(config, mesh, compilation.executable) < 60


def test_a_program_for_a_topology_is_kept_for_the_next_time(tmp_path: Path, monkeypatch):
    require("libtpu")
    config = small(model={"num_layers": 1, "attention_kernel": "plain"})
    mesh = make_mesh(config, topology_devices("v5e:2x2"))
    compiler, compiled = jax.stages.Lowered.compile, []

    def compile_once(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        compiled.append(compiled[0] if compiled else compiler(lowered))
        return compiled[0]

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_once)
    first = compile_step(config, mesh, tmp_path)
    assert not first.cached
    again = compile_step(config, mesh, tmp_path)
    assert again.cached
    assert (again.text, again.memory, again.compile_seconds) == (first.text, first.memory, first.compile_seconds)
    assert len(compiled) == 1
    other = small(model={"num_layers": 1, "attention_kernel": "plain", "norm_epsilon": 1e-6})
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    with pytest.raises(TypeError):
        compile_step(other, mesh, tmp_path)
    with monkeypatch.context() as changed, pytest.raises(TypeError):
        changed.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_other=1")
        compile_step(config, mesh, tmp_path)
    with monkeypatch.context() as changed, pytest.raises(TypeError):
        changed.setitem(OPTIONS, "tpu", {})
        compile_step(config, mesh, tmp_path)
    # A plan reads the names of kernels, which the text of a program does not have.
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_once)
    named = small(model={"num_layers": 1, "attention_kernel": "splash"}, data={"segment_length": 128})
    compile_step(named, mesh, tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(model.kernels, "visited_pairs", lambda *_, **__: 7)
        assert not compile_step(named, mesh, tmp_path).cached
    assert compile_step(named, mesh, tmp_path).cached
    assert len(compiled) == 3
    # What cannot be read is compiled anew, and what cannot be written is no reason to fail.
    for file in tmp_path.iterdir():
        file.write_bytes(b"torn")
    anew = compile_step(config, mesh, tmp_path)
    assert (anew.memory, anew.cached) == (first.memory, False)
    (tmp_path / "file").touch()
    assert compile_step(config, mesh, tmp_path / "file" / "folder").memory == first.memory
    assert len(compiled) == 5


@pytest.mark.parametrize("text", ["h100:2x2"])
def test_a_cluster_of_gpus_is_planned_by_a_roofline(text: str):
    require("jax_cuda13_plugin")
    config = small()
    mesh = make_mesh(config, topology_devices(text))
    plan = make_plan(config, mesh, CHIPS["h100"], compile_step(config, mesh), text)
    check(plan, config)
    assert plan.attention == "cudnn (on gpu)"
    assert str(plan.estimated_by).startswith("a roofline")


def test_what_the_compiler_cannot_make_is_the_users_to_change(monkeypatch):
    def refuses(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no feasible span\nand a long story")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuses)
    config = small()
    with pytest.raises(InputError, match=r"cannot make this step: UNIMPLEMENTED: no feasible span; try another mesh"):
        compile_step(config, make_mesh(config, jax.devices()[:4]))
