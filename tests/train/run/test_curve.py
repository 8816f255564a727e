"""The curve of a run for a terminal."""

from hypothesis import example, given
from hypothesis import strategies as st

from train.run.curve import BRAILLE, LEFT, LEVEL, MARK, Curve, label_rows

LOSSES = st.floats(0, 1e4) | st.sampled_from([float("nan"), float("inf"), None])


def curve_of(losses: dict[int, float], num_steps: int, evaluations: dict[int, float], bits: float = 0.5) -> Curve:
    curve = Curve(num_steps)
    for step, loss in losses.items():
        curve.add({"step": step, "loss": loss})
    for step, loss in evaluations.items():
        curve.add({"step": step, "validation_loss": loss, "validation_bits_per_byte": loss * bits})
    return curve


def row_of(lines: list, text: str, column: int | None = None) -> int:
    (row,) = [
        i for i, line in enumerate(lines) if (text in line.plain if column is None else line.plain[column] == text)
    ]
    return row


def dotted(line, column: int) -> bool:
    return BRAILLE < ord(line.plain[column]) < BRAILLE + 256


@given(
    st.dictionaries(st.integers(1, 3000), LOSSES, max_size=40),
    st.dictionaries(st.integers(1, 3000), st.floats(1e-3, 1e3), max_size=5),
    st.dictionaries(st.sampled_from(["gzip -9", "5-gram"]), st.floats(0, 20)),
    st.integers(50, 200),
    st.integers(6, 30),
)
@example({1: 0.0}, {1: 200.0}, {}, 50, 6)
def test_a_curve_of_any_figures_fits_into_its_room(losses, evaluations, levels, width, height):
    curve = curve_of(losses, 3000, evaluations)
    curve.levels = levels
    lines = curve.draw(width, height, max([0, *losses]))
    assert len(lines) in (1, height)
    assert all(line.cell_len <= width for line in lines)


def test_the_columns_are_the_steps_of_the_whole_run_and_a_loss_that_falls_goes_down():
    lines = curve_of({step: 8 - step / 10 for step in range(1, 51)}, 100, {}).draw(106 + len(" 100%"), 12, 50)
    top, bottom = lines[1], lines[-2]
    assert top.plain.startswith(" 7.90 ")
    assert bottom.plain.startswith(" 3.00 ")
    assert dotted(top, LEFT)
    assert dotted(bottom, LEFT + 49)
    assert not any(dotted(line, column) for line in lines[1:-1] for column in range(LEFT + 51, len(line.plain)))
    # No column of the half that is done is without its dots.
    assert all(any(dotted(line, LEFT + i) for line in lines[1:-1] if len(line.plain) > LEFT + i) for i in range(50))
    assert lines[-1].plain.count("█") == lines[-1].plain.count("·")


def test_a_loss_in_nats_is_drawn_at_the_bits_a_byte_of_held_out_text_with_the_same_loss():
    curve = curve_of({1: 8.0, 2: 2.0, 100: 4.0}, 100, {2: 6.0}, bits=0.25)
    curve.levels = {"gzip -9": 1.0}
    lines = curve.draw(100, 20, 100)
    assert lines[1].plain.startswith(" 2.00 ")
    assert lines[-2].plain.startswith(" 0.50 ")
    level = row_of(lines, "gzip -9 1.000")
    last = len(lines[level].plain) - len(" gzip -9 1.000") - 1
    assert dotted(lines[level], last)
    assert lines[level].plain[last - 40] == LEVEL
    assert MARK in lines[row_of(lines, "held out 1.500")].plain


def test_labels_that_want_one_row_are_all_there_in_the_order_of_their_values():
    values = {"a": 2.0, "b": 1.9, "c": 2.1}
    assert label_rows({"a": 5, "b": 5, "c": 4}, values, 8) == {5: "b", 4: "a", 3: "c"}
