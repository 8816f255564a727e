"""The stack: causality (C12), packing (C3), remat policies, and a program that does not grow with depth."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import name_p

import model.kernels
from model.config import ModelConfig
from model.context_parallel import previous_tokens
from model.decoder import REMAT_POLICIES, Block, Decoder, Inputs
from model.loss import token_losses
from model.parameters import initial_weights, parameter_table
from model.sharding import UNSHARDED
from model.trees import flattened
from settings import choices_of
from tests.small import RECORDS, VOCAB_SIZE, small_batch, small_model, small_weights


def one_document(tokens: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the decoder's arguments for tokens [T]."""
    length = len(tokens)
    return jnp.array(tokens)[None], jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)


def logits(config: ModelConfig, weights: dict, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(config, weights, *one_document(tokens))[0])


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, weights: dict, *document: jax.Array) -> jax.Array:
    decoder = Decoder(config, weights)
    return decoder.logits(decoder(*document))


@functools.partial(jax.jit, static_argnums=0)
def losses(config: ModelConfig, weights: dict, batch: dict) -> jax.Array:
    decoder = Decoder(config, weights)
    x = decoder(batch["tokens"], batch["positions"], batch["segment_ids"])
    return token_losses(x, decoder.unembedding_matrix(), batch["targets"], config).cross_entropy


@pytest.mark.parametrize("tied", [False, True])
def test_later_tokens_do_not_change_earlier_logits(tied: bool):
    config = small_model(tie_embeddings=tied)
    weights, tokens = small_weights(config), small_batch(1)["tokens"][0]
    before = logits(config, weights, tokens)
    for t in (0, 5, 14):
        changed = tokens.copy()
        changed[t + 1 :] = (changed[t + 1 :] + 7) % VOCAB_SIZE
        after = logits(config, weights, changed)
        np.testing.assert_array_equal(before[: t + 1], after[: t + 1])
        assert np.abs(before[t + 1 :] - after[t + 1 :]).max() > 1e-2


def test_one_pass_gives_the_losses_of_all_prefixes():
    config = small_model()
    weights, batch = small_weights(config), small_batch(1, padding=False)
    tokens, targets = batch["tokens"][0], batch["targets"][0]
    whole = jax.nn.log_softmax(logits(config, weights, tokens)[:, :VOCAB_SIZE])
    # Each length is a program.
    for t in (0, 1, 6, 13):
        alone = jax.nn.log_softmax(logits(config, weights, tokens[: t + 1])[-1, :VOCAB_SIZE])
        np.testing.assert_allclose(whole[t, targets[t]], alone[targets[t]], atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_a_document_in_a_packed_segment_has_the_losses_that_it_has_alone(dtype: str, tolerance: float):
    config = small_model(compute_dtype=dtype)
    weights, batch = small_weights(config), small_batch(4)
    packed = losses(config, weights, batch)
    ids = batch["segment_ids"]
    pieces = [(row, ids[row] == segment) for row in range(4) for segment in set(ids[row].tolist()) - {0}]
    assert len(pieces) > 8
    # Each alone at the beginning of a row, before padding.
    alone = {name: np.zeros((len(pieces), 16), array.dtype) for name, array in batch.items()}
    for i, (row, inside) in enumerate(pieces):
        for name, array in batch.items():
            alone[name][i, : inside.sum()] = array[row, inside]
        assert alone["positions"][i, : inside.sum()].tolist() == list(range(inside.sum()))
    for (row, inside), expected in zip(pieces, losses(config, weights, alone), strict=True):
        np.testing.assert_allclose(packed[row, inside], expected[: inside.sum()], atol=tolerance)


def gradient_of(config: ModelConfig):
    def loss(weights: dict, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(Decoder(config, weights)(tokens, positions, segment_ids)))

    return jax.jit(jax.value_and_grad(loss))


def test_remat_policies_trade_memory_and_leave_gradients_as_they_are():
    base = small_model(num_layers=4)
    weights, batch = small_weights(base), small_batch(16, 64)
    arguments = (weights, *(jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")))
    memory, expected = {}, None
    for policy in choices_of(ModelConfig, "remat_policy"):
        compiled = gradient_of(small_model(num_layers=4, remat_policy=policy)).lower(*arguments).compile()
        memory[policy] = compiled.memory_analysis().temp_size_in_bytes
        actual = compiled(*arguments)
        expected = expected or actual
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert memory["none"] > 2 * memory["products"] > 2 * memory["full"], memory
    assert memory["products"] > memory["projections"] > memory["full"], memory


LATENTS = {"kv_latent_dim": 16, "query_latent_dim": 16, "rope_dim": 4, "num_kv_heads": 4}
MIXTURE = {"num_experts": 4, "expert_dim": 12, "shared_expert_dim": 12, "dense_layers": 1}


@pytest.mark.parametrize("changes", [{}, LATENTS, MIXTURE, {"matmul_dtype": "int8"}, RECORDS])
def test_policies_know_the_names_of_all_products(changes: dict):
    config, batch = small_model(remat_policy="full", **changes), small_batch(2)
    arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    program = str(jax.make_jaxpr(gradient_of(config))(small_weights(config), *arguments))
    results = set(re.findall(r"name\[name=(\w+)\]", program)) - {"residual", "routing"}
    parts = ("blocks.attention.", "blocks.value_embedding.")
    of_attention = {name.split(".")[2] for name in parameter_table(config) if name.startswith(parts)}
    kept_by = lambda policy: {name for name in results if REMAT_POLICIES[policy](name_p, name=name)}
    assert kept_by("products") == results
    assert kept_by("projections") == results & of_attention
    assert kept_by("full") == set()


def test_each_layer_reads_its_own_sum_of_the_stream_and_of_the_first_layers_input():
    config = small_model(num_layers=3, residual_scalars=True, position="learned", max_positions=16)
    weights, batch = small_weights(config), small_batch(2)
    tokens, positions, ids = (jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids"))
    actual = jax.jit(lambda weights: Decoder(config, weights)(tokens, positions, ids))(weights)
    plain = small_model(num_layers=3, position="learned", max_positions=16)
    decoder = Decoder(plain, weights)
    first, _ = decoder.position(decoder.embedding(tokens), positions)
    attention, x = model.kernels.attention_over(plain, UNSHARDED, ids, None), first
    for layer in range(3):
        of_layer = jax.tree.map(lambda w, layer=layer: w[layer], weights["blocks"])
        scalars = of_layer.pop("scalars")
        assert abs(scalars["residual"] - 1) > 0.01 < abs(scalars["first"])
        x, _ = Block(plain, of_layer, UNSHARDED)(scalars["residual"] * x + scalars["first"] * first, None, attention)
    np.testing.assert_allclose(actual, decoder.norm(x), atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "output"])
def test_with_outputs_that_start_at_zero_each_layer_is_the_identity_up_to_its_norms(placement: str):
    config = small_model(zero_init_outputs=True, norm_placement=placement, num_experts=4, expert_dim=12,
                         dense_layers=1, shared_expert_dim=12)  # fmt: skip
    initial = jax.jit(initial_weights, static_argnums=(0, 1))
    weights, arguments = initial(config, 0), one_document(np.arange(9))
    x = Decoder(config, weights).embedding(arguments[0])
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.norm_epsilon)
    actual = jax.jit(lambda weights: Decoder(config, weights)(*arguments))(weights)
    np.testing.assert_allclose(actual, normed, rtol=1e-4, atol=1e-4)
    others = flattened(initial(small_model(num_experts=4, expert_dim=12, dense_layers=1, shared_expert_dim=12), 0))
    for name, value in flattened(weights).items():
        zero = name.endswith((".output", ".down"))
        np.testing.assert_array_equal(value, 0 * others[name] if zero else others[name], err_msg=name)


def test_without_remat_the_backward_pass_recomputes_nothing():
    for policy, expected in (("none", False), ("full", True)):
        config = small_model(remat_policy=policy)
        batch = small_batch(2)
        arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
        program = str(jax.make_jaxpr(gradient_of(config))(small_weights(config), *arguments))
        assert ("remat" in program or "checkpoint" in program) == expected


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for depth in (2, 12):
        config = small_model(num_layers=depth)
        batch = small_batch(2)
        arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
        sizes.append(len(str(jax.make_jaxpr(gradient_of(config))(small_weights(config), *arguments)).splitlines()))
    # Counted in lines of text, of which a wider number may wrap one.
    assert abs(sizes[0] - sizes[1]) <= 2


@pytest.mark.parametrize(
    ("changes", "devices", "scanned"),
    [
        ({"num_layers": 3}, 1, False),
        ({"num_layers": 3}, 2, True),
        ({"num_layers": 3, "remat_policy": "full"}, 1, True),
        ({"num_layers": 13}, 1, True),
    ],
    ids=["on one CPU", "on two", "with remat", "many layers"],
)
def test_on_one_cpu_few_layers_are_unrolled(changes: dict, devices: int, scanned: bool):
    config = small_model(**changes)
    weights, batch = small_weights(config), small_batch(2)
    arguments = (weights, *(jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")))
    gradient = gradient_of(config)
    expected = gradient(*arguments)
    with jax.set_mesh(jax.make_mesh((devices,), ("data",))):
        on_mesh = jax.tree.map(jnp.asarray, jax.device_get(arguments))
        assert ("scan[" in str(jax.make_jaxpr(gradient)(*on_mesh))) == scanned
        actual = gradient(*on_mesh)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


WATCHED = RECORDS | {"value_embedding_every": 1}


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": True, "sliding_window": 3, "attention_softcap": 1.0}, {"norm_placement": "post"}, WATCHED],
    ids=["plain", "norms and a window", "post-norm", "records"],
)
def test_watch_gives_the_largest_logit_of_visible_keys_and_the_rms_of_each_layers_output(changes: dict, monkeypatch):
    config = small_model(**changes)
    weights, batch = small_weights(config), small_batch(3)
    arguments = [jnp.array(batch[name]) for name in ("tokens", "positions", "segment_ids")]
    actual = jax.jit(lambda weights: Decoder(config, weights).watch(*arguments))(weights)
    logits, attend = [], model.kernels.attend

    def recording(q, k, v, mask, *rest):
        scores = np.einsum("bhtc,bhsc->bhts", np.asarray(q), np.repeat(np.asarray(k), 2, axis=1)) / np.sqrt(8)
        logits.append(np.abs(np.where(np.asarray(mask), scores, 0)).max())
        return attend(q, k, v, mask, *rest)

    monkeypatch.setattr(model.kernels, "attend", recording)
    decoder = Decoder(config, weights)
    previous = previous_tokens(arguments[0], arguments[2], UNSHARDED)
    x, rotations = decoder.position(decoder.embedding(arguments[0], previous), arguments[1])
    inputs = Inputs(arguments[0], x)
    (rotation,) = filter(None, rotations.values())
    attention = model.kernels.attention_over(config, UNSHARDED, arguments[2], config.sliding_window)
    for layer in range(2):
        block = Block(config, jax.tree.map(lambda w, i=layer: w[i], weights["blocks"]), UNSHARDED)
        x, _ = block(x, rotation, attention, inputs=inputs)
        np.testing.assert_allclose(actual["residual_rms"][layer], np.sqrt(np.mean(np.square(x))), rtol=1e-5)
    np.testing.assert_allclose(actual["largest_logit"], logits, rtol=1e-5)
