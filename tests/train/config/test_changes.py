"""What changes on resume: each field by its rule, and the table that a person reads."""

from train.config.changes import Change, changes_of, table
from train.config.config import Config
from train.config.reading import make_config


def test_changes_follow_the_rule_of_their_field():
    after = make_config(
        {}, {"model.num_layers": "9", "optimizer.learning_rate": "1e-4", "mesh.tensor": "2", "train.seed": "1"}
    )
    assert changes_of(Config(), after) == {
        "frozen": [Change("model.num_layers", 4, 9), Change("train.seed", 0, 1)],
        "warn": [Change("optimizer.learning_rate", 3e-4, 1e-4)],
        "free": [Change("mesh.tensor", 1, 2)],
    }
    assert changes_of(after, after) == {"frozen": [], "warn": [], "free": []}


def test_another_order_of_groups_is_a_change():
    groups = ['{"*.query": {"learning_rate": 0.2}, "blocks.*": {"learning_rate": 0.1}}']
    groups.append('{"blocks.*": {"learning_rate": 0.1}, "*.query": {"learning_rate": 0.2}}')
    before, after = (make_config({}, {"optimizer.groups": text}) for text in groups)
    assert [change.field for change in changes_of(before, after)["warn"]] == ["optimizer.groups"]


def test_a_table_has_aligned_columns_and_values_as_flags_give_them():
    changes = [Change("a.b", None, True), Change("data.corpus", "0123456789abcdef" * 4, {"x": 1})]
    assert table(changes).splitlines() == [
        "  field        before        now",
        "  a.b          none          true",
        "  data.corpus  0123456789ab  {'x': 1}",
    ]
