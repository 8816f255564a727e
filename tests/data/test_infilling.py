"""Fill-in-the-middle: no text is lost, and the seed and the document alone decide (C1, C2)."""

import copy
import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tokenizers import AddedToken
from tokenizers import Tokenizer as TheirTokenizer

from data.config import DataConfig
from data.corpus import Corpus, Document, open_corpus
from data.errors import InputError
from data.infilling import Infilling, Marks, mark_names, middle_prompt, open_infillings
from data.loader import Loader, gather_positions
from data.mixture import open_mixture
from data.provenance import describe_row, summarize
from data.segmenter import make_segment
from data.stream import BEGINNING, Rows, Stream, StreamPosition, document_pairs, open_readers
from data.tokenizer.folder import load_tokenizer
from data.tokenizer.tokenizer import FIM_TOKENS, Tokenizer
from data.tokenizer.training import train_tokenizer
from tests.data import others
from tests.data.stand_in import tokenize
from tests.data.test_stream import CONFIG, SHAPES, assert_restores, some_texts, stream, write
from tests.data.texts import code

MARKS = Marks(300, 301, 302)
FIM = dataclasses.replace(CONFIG, fim_rate=0.6, fim_spm_rate=0.4)
TEXTS = st.text("abc é\n", min_size=1, max_size=60)


def infilling(rate: float = 0.6, spm_rate: float = 0.4, seed: int = 0) -> Infilling:
    return Infilling(rate, spm_rate, seed, MARKS)


def documents(number: int) -> list[Document]:
    return [Document(f"text {i} " * (1 + i % 5), i % 7, 31 * i) for i in range(number)]


def reassembled(tokens: list[int]) -> str:
    """The text of a transformed document, by the places of the marks alone; those must be in one of the two orders."""
    P, S, M = map(tokens.index, MARKS)
    text = lambda begin, end: bytes(token - 1 for token in tokens[begin:end])
    assert P == 0
    if S == 1:
        suffix, prefix_and_middle = text(2, M), text(M + 1, None)
        return (prefix_and_middle + suffix).decode()
    assert P < S < M
    return (text(1, S) + text(M + 1, None) + text(S + 1, M)).decode()


@given(text=TEXTS, seed=st.integers(0, 2**32 - 1), place=st.integers(0, 2**40), spm=st.sampled_from([0.0, 1.0]))
def test_the_pieces_of_a_document_are_its_text(text: str, seed: int, place: int, spm: float):
    transform = infilling(1.0, spm, seed)
    document = Document(text, 3, place)
    infill = transform.infill(document)
    prefix, suffix, middle = text[: infill.begin], text[infill.end :], text[infill.begin : infill.end]
    assert prefix + middle + suffix == text
    P, S, M = MARKS
    psm, spm_order = [P, prefix, S, suffix, M, middle], [P, S, suffix, M, prefix, middle]
    assert infill.pieces(text) == (spm_order if spm else psm)
    [pairs] = document_pairs([document], tokenize, [257], 0, transform)
    assert reassembled(pairs.targets[:-1].tolist()) == text
    assert pairs.targets[-1] == 0  # the end follows the middle
    assert pairs.inputs[0] == 257
    assert pairs.trained.all()


def test_documents_are_cut_as_often_and_where_the_settings_say():
    many = documents(8000)
    infills = [infilling(0.3, 0.25).infill(document) for document in many]
    made = [(infill, len(document.text)) for infill, document in zip(infills, many, strict=True) if infill]
    # Within four deviations of a share of so many.
    assert len(made) / 8000 == pytest.approx(0.3, abs=4 * (0.21 / 8000) ** 0.5)
    assert sum(infill.spm for infill, _ in made) / len(made) == pytest.approx(0.25, abs=4 * (0.19 / len(made)) ** 0.5)
    # Two uniform cuts leave each piece a third on average.
    for piece in range(3):
        sizes = [(end - begin) / n for infill, n in made for begin, end in [infill._replace(spm=False).spans(n)[piece]]]
        assert np.mean(sizes) == pytest.approx(1 / 3, abs=0.03)
    assert not any(infilling(0.0).infill(document) for document in many)
    assert all(infilling(1.0).infill(document) for document in many)


def test_the_seed_and_the_document_decide_alone():
    document = Document("some text of a document", 1, 10)
    found = infilling(1.0).infill(document)
    assert infilling(1.0).infill(dataclasses.replace(document)) == found
    for other in (
        [infilling(1.0, seed=s).infill(document) for s in range(20)],
        [infilling(1.0).infill(dataclasses.replace(document, place=p)) for p in range(20)],
        [infilling(1.0).infill(dataclasses.replace(document, file=f)) for f in range(20)],
    ):
        assert len({(infill.begin, infill.end, infill.spm) for infill in other}) > 15


def test_prompts_and_pieces_without_an_end_stay_as_they_are():
    for document in (Document("abc", 0, 0, prompt="p"), Document("abc", 0, 0, ends=False)):
        assert infilling(1.0).infill(document) is None


# ---- Streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[".jsonl", ".jsonl.gz"])
def corpus(request, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One whose streams have chunks of their own, and one that they share."""
    return open_corpus(write(tmp_path_factory.mktemp("corpus"), some_texts(), request.param), CONFIG)


def infilled(corpus: Corpus, v: int, position: StreamPosition = BEGINNING, config: DataConfig = FIM) -> Rows:
    transform = infilling(config.fim_rate, config.fim_spm_rate)
    return stream(corpus, v, position, config=config, infilling=transform)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_epoch_trains_once_on_every_token_and_mark(corpus, shape):
    config = dataclasses.replace(FIM, epochs=1, **shape)
    trained: dict[tuple[int, int], Counter] = {}
    texts, marked = {}, set()
    for v in range(config.num_streams):
        for parts, _ in infilled(corpus, v, config=config):
            weights, filled = make_segment(parts, config)["loss_weights"], 0
            for pairs, begin, end in parts:
                key = (pairs.document.file, pairs.document.place)
                own = weights[filled : filled + end - begin]
                trained.setdefault(key, Counter()).update(int(i) for i in np.flatnonzero(own) + begin)
                filled += end - begin
                tokens = pairs.targets[:-1].tolist()
                is_marked = MARKS.prefix in tokens
                texts[key] = reassembled(tokens) if is_marked else bytes(t - 1 for t in tokens).decode()
                marked |= {key} if is_marked else set()
    wanted = {(d.file, d.place): d.text for chunk in corpus.chunks for d in corpus.documents(chunk)}
    assert texts == wanted
    assert 0.4 < len(marked) / len(wanted) < 0.8
    for key, pairs in trained.items():
        assert pairs == Counter(range(len(wanted[key].encode()) + 1 + 3 * (key in marked)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@hypothesis.settings(max_examples=15)
@given(rows=st.integers(0, 400), v=st.integers(0, 2))
def test_a_position_within_a_document_restores_the_rest(corpus, rows, v, shape):
    config = dataclasses.replace(FIM, **shape)
    assert_restores(lambda position: infilled(corpus, v, position, config), rows, config)


def test_the_order_of_the_documents_is_that_without_it(corpus):
    def order(config: DataConfig, transform: Infilling | None) -> list[tuple[int, int]]:
        rows = stream(corpus, 1, config=dataclasses.replace(config, epochs=2), infilling=transform)
        places = [(part.pairs.document.file, part.pairs.document.place) for parts, _ in rows for part in parts]
        return [place for place, _ in itertools.groupby(places)]

    assert order(FIM, infilling()) == order(CONFIG, None)


def test_a_document_is_cut_alike_in_every_epoch(corpus):
    def cuts(epoch: int) -> dict[tuple[int, int], object]:
        rows = infilled(corpus, 0, StreamPosition(epoch), dataclasses.replace(FIM, epochs=epoch + 1, num_streams=1))
        pairs = [part.pairs for parts, _ in rows for part in parts]
        return {(p.document.file, p.document.place): p.infill for p in pairs}

    first, later = cuts(0), cuts(3)
    both = first.keys() & later.keys()
    assert len(both) > 30
    assert all(first[key] == later[key] for key in both)


# ---- Real tokenizers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(code()[:10], 1000, tmp_path_factory.mktemp("ours"), FIM_TOKENS)


def with_marks(kind: str, special: bool, names: tuple[str, ...] = FIM_TOKENS) -> dict:
    tokenizer = TheirTokenizer.from_str(json.dumps(others.byte_level(kind)))
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=special) for name in names])
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module", params=["ours", "special", "not special"])
def tokenizer(request, ours, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "ours":
        return ours
    # Qwen's marks are added tokens that are not special, so its tokenizer finds them in a text.
    settings = with_marks("qwen", request.param == "special")
    return load_tokenizer(others.write(tmp_path_factory.mktemp("qwen"), settings, others.EOS))


@pytest.fixture(scope="module")
def code_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("code") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text[:600]}) + "\n" for text in code()))
    return str(path)


def loaded(path: str, tokenizer: Tokenizer, count: int, devices: int = 1, positions=None, **changes):
    config = DataConfig(segment_length=64, num_streams=4, chunk_bytes=20_000, shuffle_window=50_000, corpus=path)
    config = dataclasses.replace(config, **({"fim_rate": 0.5} | changes))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    mixture = open_mixture(config, lambda: "")
    with Loader(mixture, tokenizer, config, 0, itertools.repeat(8), sharding, positions) as loader:
        return [(jax.device_get(made.batch), made.positions) for made in itertools.islice(loader, count)]


def assert_same(one, other):
    for (batch, positions), (other_batch, other_positions) in zip(one, other, strict=True):
        np.testing.assert_array_equal(positions, other_positions)
        for name in batch:
            np.testing.assert_array_equal(batch[name], other_batch[name])


def test_batches_are_the_same_on_any_devices_and_workers_and_after_any_batch(code_corpus, ours):
    expected = loaded(code_corpus, ours, 7)
    marks = set(ours.fim_ids())
    assert marks <= {int(token) for batch, _ in expected for token in batch["targets"].flat}
    assert_same(loaded(code_corpus, ours, 7, devices=4), expected)
    assert_same(loaded(code_corpus, ours, 7, num_workers=3), expected)
    for done in (1, 3):
        after = gather_positions(expected[done - 1][1])
        assert_same(loaded(code_corpus, ours, 7 - done, positions=after), expected[done:])
    # Without it, marks in the tokenizer change nothing.
    plain, _ = loaded(code_corpus, ours, 1, fim_rate=0.0)[0]
    assert not marks & set(plain["tokens"].ravel().tolist())


def test_a_mark_in_a_text_is_no_mark(tokenizer):
    P, S, M = FIM_TOKENS
    text = f"the tokens {P}, {S} and {M}{M} of {P}others{S}"
    for rate in (0.0, 1.0):
        configs = [dataclasses.replace(CONFIG, fim_rate=rate), FIM]
        transform, _ = open_infillings(configs, tokenizer, 0)
        for place in range(60):
            document = Document(text, 0, place)
            [pairs] = document_pairs([document], tokenizer.encode_all, [1], 1, transform)
            marks = [token for token in pairs.targets.tolist() if token in tokenizer.fim_ids()]
            assert len(marks) == (3 if rate else 0)
            assert sorted(marks) == sorted(set(marks))
            if not rate:
                assert tokenizer.decode(pairs.targets[:-1]) == text


@pytest.mark.parametrize("spm", [False, True])
def test_a_middle_is_asked_for_as_its_document_begins_in_training(tokenizer, spm):
    transform = dataclasses.replace(open_infillings([FIM], tokenizer, 0)[0], rate=1.0, spm_rate=float(spm))
    text = f"def mean(xs):\n    return sum(xs) / len(xs)  # é {FIM_TOKENS[0]} and {FIM_TOKENS[2]}\n"
    for place in range(40):
        document = Document(text, 0, place)
        infill = transform.infill(document)
        [pairs] = document_pairs([document], tokenizer.encode_all, tokenizer.bos_ids, tokenizer.eos_id, transform)
        asked = middle_prompt(tokenizer, text[: infill.begin], text[infill.end :], spm)
        [*rest] = pairs.targets[len(asked) - len(tokenizer.bos_ids) :].tolist()
        assert [*pairs.inputs.tolist(), tokenizer.eos_id][: len(asked)] == asked
        assert tokenizer.decode(rest[:-1]) == text[infill.begin : infill.end]
        assert rest[-1] == tokenizer.eos_id


def test_the_description_of_a_row_shows_the_pieces_in_their_order(code_corpus, tokenizer):
    config = DataConfig(segment_length=200, num_streams=1, corpus=code_corpus, fim_rate=1.0)
    mixture = open_mixture(config, lambda: "")
    corpus = mixture.sources[0].corpus
    transform = open_infillings([config], tokenizer, 0)[0]
    reader = open_readers(corpus, config, 0, {0: BEGINNING})[0]
    rows = Stream(reader, tokenizer.encode_all, tokenizer.bos_ids, tokenizer.eos_id, config, 0, transform).rows()
    shown: dict[int, list[dict]] = {}
    source: dict[int, Document] = {}
    for parts, _ in itertools.islice(rows, 60):
        row = describe_row(mixture, tokenizer, 0, 0, parts)
        for part, described in zip(parts, row["parts"], strict=True):
            shown.setdefault(part.pairs.document.place, []).append(described)
            source[part.pairs.document.place] = part.pairs.document
    finished = [place for place, parts in shown.items() if parts[-1]["end"]]
    assert {shown[place][0]["fim"] for place in finished} == {"PSM", "SPM"}
    P, S, M = FIM_TOKENS
    for place in finished:
        text, parts = source[place].text, shown[place]
        begin, end = parts[0]["middle"]
        prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
        psm = f"{P}{prefix}{S}{suffix}{M}{middle}"
        # A character whose tokens are in two rows is in neither.
        expected = psm if parts[0]["fim"] == "PSM" else f"{P}{S}{suffix}{M}{prefix}{middle}"
        found = "".join(part["text"] for part in parts)
        assert found == expected or (not text.isascii() and set(found) <= set(expected))
        assert min(part["characters"][0] for part in parts) == 0
        assert max(part["characters"][1] for part in parts) == len(text)


def test_the_estimate_of_the_tokens_counts_the_marks(code_corpus, ours):
    config = DataConfig(segment_length=64, num_streams=1, corpus=code_corpus)
    tokens = []
    for rate in (0.0, 1.0):
        mixture = open_mixture(dataclasses.replace(config, fim_rate=rate), lambda: "")
        [summary] = summarize(mixture, ours, 0, [(0, 5, 64)])
        tokens.append(summary["tokens"])
    # Cuts inside words add a few more.
    assert tokens[0] + 3 * summary["documents"] <= tokens[1] < 1.1 * tokens[0] + 3 * summary["documents"]


def test_marks_are_found_by_name_or_named(tmp_path: Path):
    for names in (FIM_TOKENS, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), ("▁<PRE>", "▁<SUF>", "▁<MID>")):
        folder = others.write(tmp_path / names[0], with_marks("gpt2", True, names), others.EOS)
        assert mark_names(FIM, load_tokenizer(folder)) == names
    named = ("<[P]>", "<[S]>", "<[M]>")
    folder = others.write(tmp_path / "other", with_marks("gpt2", True, named), others.EOS)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.fim_tokens is None
    config = dataclasses.replace(FIM, fim_tokens=",".join(named))
    assert mark_names(config, tokenizer) == named
    # A run's copy of the tokenizer, and an export of that, know them without the config.
    fingerprint = tokenizer.fingerprint
    for copied in ("copy", "copy of the copy"):
        tokenizer.fim_tokens = named
        (tmp_path / copied).mkdir()
        for name, content in tokenizer.files().items():
            (tmp_path / copied / name).write_bytes(content)
        tokenizer = load_tokenizer(tmp_path / copied)
        assert tokenizer.fim_tokens == named
        assert tokenizer.fingerprint == fingerprint


def test_a_tokenizer_without_marks_is_refused_by_name(tmp_path: Path, ours):
    plain = load_tokenizer(others.write(tmp_path / "plain", others.byte_level("gpt2"), others.EOS))
    with pytest.raises(InputError, match=r"has no tokens that are known to mark.*data\.fim_tokens"):
        mark_names(FIM, plain)
    for name in ("<nothing>", "the"):
        named = dataclasses.replace(FIM, fim_tokens=f"<think>,{name},<|begin|>")
        with pytest.raises(InputError, match=f"has no added token '{name}'; it has <think>, <|begin|>"):
            mark_names(named, plain)
    spaced = copy.copy(ours)
    spaced.adds_space = True
    with pytest.raises(InputError, match="puts a space before every text"):
        mark_names(FIM, spaced)
    for tokenizer, words in ((plain, "has no tokens that are known to mark"), (spaced, "puts a space before every")):
        with pytest.raises(InputError, match=f"{words}.*; give a model that was trained with data.fim_rate"):
            middle_prompt(tokenizer, "a", "b", spm=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fim_rate": 1.1}, "data.fim_rate is 1.1; it must be from 0 to 1"),
        ({"fim_rate": 0.5, "fim_spm_rate": -0.1}, "data.fim_spm_rate is -0.1; it must be from 0 to 1"),
        ({"fim_spm_rate": 0.1}, "data.fim_spm_rate has no effect with data.fim_rate = 0; leave it at 0.5"),
        ({"fim_tokens": "a,b,c"}, "data.fim_tokens has no effect with data.fim_rate = 0; leave it at none"),
        ({"fim_rate": 0.5, "fim_tokens": "a,b"}, "data.fim_tokens is 'a,b'; it must be three names"),
        ({"fim_rate": 0.5, "fim_tokens": "ab,cd,ab"}, "data.fim_tokens is 'ab,cd,ab'; it must be three names"),
        ({"fim_rate": 0.5, "fim_tokens": "a,bc,de"}, "data.fim_tokens is 'a,bc,de'; it must be three names"),
        ({"corpus": {"a": {"corpus": "x", "fim_rate": 2}}}, "data.corpus['a']: fim_rate is 2; it must be a number"),
        ({"corpus": {"a": {"corpus": "x", "fim_rate": "1"}}}, "data.corpus['a']: fim_rate is '1'; it must be"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    assert any(problem.startswith(words) for problem in DataConfig(**changes).problems()), DataConfig(
        **changes
    ).problems()


def test_a_corpus_of_a_mixture_may_have_its_own_rate(code_corpus, ours):
    corpora = {"web": {"corpus": code_corpus}, "code": {"corpus": code_corpus, "fim_rate": 1.0}}
    config = DataConfig(corpus=corpora, num_streams=1)
    assert config.fills_in
    assert config.problems() == []
    mixture = open_mixture(config, lambda: "")
    by_name = {source.name: source.config.fim_rate for source in mixture.sources}
    assert by_name == {"web": 0.0, "code": 1.0}
    rates = [transform.rate for transform in open_infillings([s.config for s in mixture.sources], ours, 0)]
    assert rates == [by_name[source.name] for source in mixture.sources]
