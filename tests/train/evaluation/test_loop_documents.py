"""The documents that are evaluated during training: the beginnings of many, in a number of bytes."""

from hypothesis import given
from hypothesis import strategies as st

from train.config.reading import make_config
from train.evaluation.documents import BYTES_PER_TOKEN, by_corpus, loop_documents, take_bytes
from train.run.folder import HeldOutDocument

DOCUMENTS = st.lists(
    st.builds(
        HeldOutDocument,
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300),
        st.text(max_size=0) | st.text("ab", max_size=20),
        st.sampled_from(["", "a", "b"]),
        st.just(False),
        st.none(),
    ),
    max_size=40,
)


def size_of(texts: list[HeldOutDocument]) -> int:
    return sum(len((text.prompt + text.text).encode()) for text in texts)


@given(DOCUMENTS, st.integers(4, 5000), st.integers(1, 64))
def test_the_loops_documents_are_beginnings_of_as_many_as_have_room(held_out, loop_bytes, length):
    config = make_config({"data": {"segment_length": length}, "evaluation": {"loop_bytes": loop_bytes}})
    found, groups = by_corpus(loop_documents(held_out, config)), by_corpus(held_out)
    for name, group in groups.items():
        size, taken = loop_bytes // len(groups), found.get(name, [])
        # At most the last one, whose prompt alone may be too long, goes beyond.
        assert size_of(taken) <= size
        left = iter(group)
        for text in taken:
            document = next(other for other in left if (other.prompt, other.text[: len(text.text)]) == text[1::-1])
            assert text.cut == (text.text != document.text)
        if size_of(group) <= size // 2 and size >= len(group) * BYTES_PER_TOKEN * max(length, 400):
            assert taken == group
        if not any(text.prompt for text in group) and size >= BYTES_PER_TOKEN * length:
            assert len(taken) == min(len(group), size // (BYTES_PER_TOKEN * length))


def test_a_curve_over_long_documents_is_of_many_of_them():
    held_out = [HeldOutDocument(f"{i:04}" * 25_000) for i in range(30)]
    found = loop_documents(held_out, make_config({"evaluation": {"loop_bytes": 2**16}}))
    assert len(found) == 30
    assert 2**16 - 30 <= size_of(found) <= 2**16


def test_a_conversation_that_is_cut_keeps_its_whole_answers():
    text = "é? yes. no? no. why? so."
    document = HeldOutDocument(text, answers=((3, 7), (12, 15), (21, 24)))
    assert document.scored == "yes.no.so."
    for size, scored in ((25, "yes.no.so."), (24, "yes.no."), (16, "yes.no."), (15, "yes."), (8, "yes.")):
        [cut] = take_bytes([document], size)
        assert (cut.scored, len(cut.text.encode())) == (scored, min(size, 25))
    assert take_bytes([document], 7) == []
