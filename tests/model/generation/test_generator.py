"""Generation: the cache against the full pass, batching, the end, sliding past the context, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model.generation.decoder
import model.generation.generator
import model.generation.weights
from model.config import ModelConfig
from model.decoder import Decoder
from model.generation.decoder import empty_cache
from model.generation.generator import Generator, round_up
from model.generation.programs import DecodeState, RowState, SampledModel, decode_steps
from model.generation.sampling import GREEDY, Sampling
from model.generation.weights import decoding_weights
from model.parameters import parameter_table
from model.sharding import UNSHARDED
from model.trees import flattened, nested
from tests.small import RECORDS, VOCAB_SIZE, mesh_of, small_batch, small_model, small_weights
from train.devices.rules import GENERATION

NO_EOS = -1  # no token has this id
CONTEXT = 12
# Few lengths, because each power of two is a program.
PROMPTS = [[1, 2, 3, 4, 5], small_batch(1)["tokens"][0][:7].tolist(), [4] * CONTEXT, list(range(9)), [11] * 6]


def generator(config: ModelConfig, *, eos_id: int = NO_EOS, context: int = CONTEXT, int8: bool = False) -> Generator:
    return Generator(config, small_weights(config), context=context, eos_id=eos_id, int8=int8)


def generated(generator: Generator, prompts: list, sampling: Sampling = GREEDY, new: int = 30, **how) -> list:
    """Returns the tokens of each prompt, and how it ended."""
    tokens, ends = {}, {}
    for number, piece, ended, _ in generator(prompts, max_new_tokens=new, sampling=sampling, **how):
        assert number not in ends
        tokens[number] = tokens.get(number, []) + piece
        if ended:
            ends[number] = ended
    return [(tokens[number], ends[number]) for number in range(len(prompts))]


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config: ModelConfig, weights: dict, tokens_BT: jax.Array) -> jax.Array:
    decoder = Decoder(config, weights)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return decoder.logits(decoder(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))


def check_greedy(config: ModelConfig, prompt: list[int], actual: list[int], tolerance: float) -> None:
    """Asserts that each token is the most likely one by a full pass over the window, up to rounding."""
    seen, rows = list(prompt), []
    for token in actual:
        rows.append(seen + [0] * (CONTEXT - len(seen)) + [len(seen) - 1, token])
        seen.append(token)
        if len(seen) == CONTEXT + 1:
            # The context is full: the model sees the newer half, with the token just drawn.
            seen = seen[-(CONTEXT // 2) :]
    *tokens, last, drawn = np.array(rows, np.int32).T
    logits = np.asarray(full_logits(config, small_weights(config), jnp.array(tokens).T))[np.arange(len(rows)), last]
    assert np.all(logits[np.arange(len(rows)), drawn] >= logits.max(axis=-1) - tolerance)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 2e-5),
        ({"compute_dtype": "bfloat16", "position": "learned", "max_positions": CONTEXT}, 0.1),
        (RECORDS, 2e-5),
    ],
)
def test_greedy_rows_follow_the_full_pass_and_slide_past_the_context(changes: dict, tolerance: float):
    config = small_model(**changes)
    for prompt, (tokens, ended) in zip(PROMPTS, generated(generator(config), PROMPTS, batch_size=4), strict=True):
        assert (len(tokens), ended) == (30, "length")
        assert len(set(tokens)) > 3
        check_greedy(config, prompt, tokens, tolerance)


def test_a_row_gives_the_tokens_that_it_gives_alone_in_any_batch():
    # Sampled with a penalty, so that keys and seen tokens must be the row's own, too.
    sampling = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3)
    rows = generator(small_model(**RECORDS))
    alone = generated(rows, PROMPTS, sampling, new=20, seed=7, batch_size=1)
    assert generated(rows, PROMPTS, sampling, new=20, seed=7, batch_size=3) == alone
    assert generated(rows, PROMPTS[:2], sampling, new=20, seed=8) != alone[:2]
    # The same prompt twice is continued in two ways.
    assert len({tuple(tokens) for tokens, _ in generated(rows, [[1]] * 3, sampling, seed=7)}) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_in_8_bits_tokens_are_likely_ones_and_every_row_is_alone(tied: bool):
    config = small_model(num_layers=1, tie_embeddings=tied, attention_bias=True)
    model = generator(config, int8=True)
    matrices = [weight for weight in jax.tree.leaves(model.weights) if weight.dtype == np.int8]
    assert len(matrices) == 7 * config.num_layers + 1
    rows = generated(model, PROMPTS, batch_size=4)
    for prompt, (tokens, _) in zip(PROMPTS, rows, strict=True):
        check_greedy(config, prompt, tokens, 0.1)
    assert generated(model, PROMPTS) == rows


def test_the_loop_of_decode_steps_reads_the_cache_and_does_not_carry_it():
    # XLA would copy a cache that each step both reads and extends.
    config, rows = small_model(), RowState(*np.ones((4, 2), np.int32))
    model = SampledModel(config, UNSHARDED, GREEDY, decoding_weights(config, small_weights(config)), 0)
    state = DecodeState(empty_cache(config, 2, 40), None)
    jaxpr = jax.make_jaxpr(decode_steps)(model, rows, state, jnp.array([NO_EOS]), 9, 9).eqns[0].params["jaxpr"].jaxpr
    [loop] = [equation for equation in jaxpr.eqns if equation.primitive.name == "while"]
    assert not [result for result in loop.outvars if 40 in result.aval.shape]
    assert [result for result in jaxpr.outvars if 40 in result.aval.shape]


def test_a_row_ends_before_eos_and_after_the_limit_and_gives_its_slot_to_the_next():
    config = small_model()
    free = generated(generator(config), PROMPTS, new=20)
    end = next(token for i, token in enumerate(free[1][0]) if i > 4 and token not in free[1][0][:i])
    actual = generated(generator(config, eos_id=end), PROMPTS, new=20, batch_size=2)
    for (tokens, ended), (longer, _) in zip(actual, free, strict=True):
        until = longer.index(end) if end in longer else 20
        assert (tokens, ended) == (longer[:until], "eos" if end in longer else "length")
    # The first token may be EOS, too.
    first = generated(generator(config, eos_id=free[0][0][0]), PROMPTS[:1])
    assert first == [([], "eos")]
    assert generated(generator(config), PROMPTS, new=1, batch_size=2) == [(t[:1], "length") for t, _ in free]


def test_a_row_that_is_stopped_draws_no_more():
    stopped, pieces = set(), []
    for piece in generator(small_model())(PROMPTS, max_new_tokens=30, sampling=GREEDY, batch_size=2, stopped=stopped):
        pieces.append(piece.prompt_index)
        if piece.prompt_index == 0:
            stopped.add(0)
    assert pieces.count(0) == 1
    assert pieces.count(1) > 2
    assert set(pieces) == set(range(len(PROMPTS)))


def test_of_a_long_prompt_the_end_is_seen_and_nothing_may_be_asked_for():
    rows, long = generator(small_model()), list(range(20))
    whole, seen = generated(rows, [long, long[-CONTEXT:]], new=5)
    assert whole == seen
    assert list(rows([], max_new_tokens=1, sampling=GREEDY)) == []
    assert list(rows(PROMPTS[:2], max_new_tokens=0, sampling=GREEDY)) == [
        (number, [], "length", None) for number in (0, 1)
    ]


def test_a_cache_is_a_quarter_longer_than_needed_at_most_and_few_lengths_are_compiled():
    lengths = [round_up(n) for n in range(1, 4097)]
    assert all(n <= length <= 1.25 * n + 1 for n, length in enumerate(lengths, 1))
    assert len(set(lengths)) == 4 + 4 * 10


def test_the_penalty_counts_all_of_the_prompt_and_of_what_was_drawn():
    # A penalty above any logit: no token of the prompt or the continuation comes again, even past the context.
    prompt = list(range(100, 130))
    # With tied embeddings a token is its own likeliest successor.
    model = generator(small_model(num_layers=1, tie_embeddings=True))
    [(free, _)] = generated(model, [prompt])
    assert len(set(free)) < 15
    [(tokens, _)] = generated(model, [prompt], Sampling(temperature=0.0, repetition_penalty=1e6))
    assert len(set(tokens)) == 30
    assert not set(tokens) & set(prompt)


def test_other_platforms_decode_the_same_tokens_with_weights_in_their_usual_order(monkeypatch):
    config = small_model(tie_embeddings=False)
    on_cpu = generator(config)
    expected = generated(on_cpu, PROMPTS[:2], new=9, batch_size=2)
    for module in (model.generation.weights, model.generation.decoder):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    # The platform is read while tracing.
    jax.clear_caches()
    try:
        elsewhere = generator(config)
        assert generated(elsewhere, PROMPTS[:2], new=9, batch_size=2) == expected
    finally:
        jax.clear_caches()
    shapes = [weights["unembedding"]["matrix"].shape for weights in (elsewhere.weights, on_cpu.weights)]
    assert shapes == [(config.model_dim, 384), (384, config.model_dim)]


def test_the_same_prompt_is_prefilled_once_and_its_continuations_differ(monkeypatch):
    config, prefilled = small_model(), []
    generating = model.generation.generator
    prefill = generating.prefill
    counted = lambda *given: (prefilled.append(given), prefill(*given))[1]
    monkeypatch.setattr(generating, "prefill", counted)
    prompts, many = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 2, generator(config)
    found = generated(many, prompts, Sampling(), new=5, batch_size=3)
    assert len(prefilled) == 2
    assert len({*map(str, found)}) == 6
    # The random keys are of the prompt's place alone.
    assert generated(many, prompts, Sampling(), new=5, batch_size=1) == found
    for delta in generator(config, eos_id=found[0][0][2])(prompts[:1], max_new_tokens=5, sampling=Sampling()):
        last = delta
    assert (last.ended, last.end_id) == ("eos", found[0][0][2])


WINDOWS = {"layer_pattern": "SF", "sliding_window": 5}
LATENTS = {"kv_latent_dim": 8, "head_dim": 12, "rope_dim": 4, "value_dim": 8, "num_kv_heads": 4}


@pytest.mark.parametrize(
    "changes",
    [LATENTS | WINDOWS, RECORDS],
    ids=["latents", "records"],
)
def test_a_mesh_gives_the_same_tokens_as_one_device(changes: dict):
    config = small_model(vocab_size=VOCAB_SIZE - 1, **changes)
    sampling = Sampling(top_k=5, repetition_penalty=1.1)
    prompts = [PROMPTS[i] for i in (0, 1, 4)]  # one program prefills them
    expected = generated(generator(config), prompts, sampling, new=9, batch_size=2)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        table, weights = parameter_table(config), flattened(small_weights(config))
        placed = {
            name: jax.device_put(value, jax.NamedSharding(jax.sharding.get_mesh(), GENERATION.spec(*table[name].axes)))
            for name, value in weights.items()
        }
        shared = Generator(config, nested(placed), context=CONTEXT, eos_id=NO_EOS, layout=GENERATION)
        query = shared.weights["blocks"][0]["attention"]["query"]
        assert query.sharding.shard_shape(query.shape)[0] == config.num_heads // 2
        assert generated(shared, prompts, sampling, new=9, batch_size=2) == expected
