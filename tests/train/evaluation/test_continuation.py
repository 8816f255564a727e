"""Texts from tokens: characters of several tokens, and stop strings however they are cut."""

from hypothesis import given
from hypothesis import strategies as st

from train.evaluation.continuation import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


text = st.text(alphabet="abé", max_size=12)


@given(
    whole=text,
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=2),
    cuts=st.lists(st.integers(1, 5)),
)
def test_a_text_is_cut_before_its_first_stop_string_wherever_its_pieces_end(whole: str, stop: list, cuts: list):
    tokens, unfolding, parts = list(whole.encode()), TextStream(Bytes(), stop), []
    for size in [*cuts, len(tokens)]:
        parts.append(unfolding.add(tokens[:size]))
        tokens = tokens[size:]
        # What has been told is never taken back.
        assert whole.startswith("".join(parts))
    parts.append(unfolding.finish())
    # That which is complete first; of those that end together the longest.
    ends = [(whole.index(one) + len(one), whole.index(one)) for one in stop if one in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    assert "".join(parts) == expected
    assert unfolding.stopped == bool(ends)
    assert unfolding.tokens == len(whole[: min(ends)[0]].encode() if ends else whole.encode())


def test_half_a_character_at_the_end_is_told():
    unfolding = TextStream(Bytes(), [])
    assert unfolding.add("é".encode()[:1]) == ""
    assert unfolding.finish() == "\ufffd"
