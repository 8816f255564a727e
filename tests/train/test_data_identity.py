"""Where a run continues in data that has changed."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data.formats.template import ChatTemplate
from data.mixture import initial_positions, open_mixture
from train.config.reading import make_config
from train.data_identity import RunInputs, continue_data, identity_of


def test_no_stream_repeats_an_epoch_that_any_has_begun_before_a_change(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    data = {"corpus": str(path), "num_streams": 4, "accept_changes": True}
    config = make_config({"data": data, "train": {"batch_size": 4, "run_dir": str(tmp_path / "run")}}).resolved()
    tokenizer: Any = None
    inputs = RunInputs(config, open_mixture(config.data, lambda: ""), tokenizer, [], {"data.corpus": "new"})
    positions = initial_positions(inputs.mixture, 4)
    positions[:, 0, 0] = [2, 3, 3, 2]
    progress = {"identity": {"data.corpus": "old"}, "positions": positions.tolist()}
    after, again = continue_data(progress, inputs, tmp_path / "run")
    np.testing.assert_array_equal(again[:, 0, 0], 4)
    assert after.held_out
    held_out = {document.text for document in inputs.mixture.sources[0].corpus.held_out()}
    assert {text.text for text in after.held_out} == held_out


def test_fill_in_the_middle_is_part_of_the_identity_only_where_it_is_used(tmp_path: Path):
    """Runs from before there was any have no such fields, and go on."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))

    def fields(**data: Any) -> dict[str, Any]:
        config = make_config({"data": {"corpus": str(path), "num_streams": 1} | data}).resolved()
        identity = identity_of(config, open_mixture(config.data, lambda: ""))
        return {name: value for name, value in identity.items() if "fim" in name}

    assert fields() == {}
    assert fields(fim_rate=0.5) == {"data.fim_rate": 0.5, "data.fim_spm_rate": 0.5, "data.fim_tokens": None}
    several = {"web": {"corpus": str(path)}, "code": {"corpus": str(path), "fim_rate": 0.25}}
    rates = {name: value for name, value in fields(corpus=several).items() if name.endswith("fim_rate")}
    assert rates == {"data.fim_rate": 0.0, "data.corpus['code'].fim_rate": 0.25, "data.corpus['web'].fim_rate": 0.0}
    assert fields(corpus={"web": {"corpus": str(path)}}) == {}


def test_conversations_and_their_template_are_part_of_the_identity_only_where_there_are_any(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("".join(json.dumps({"text": f"document {i}", "messages": turns}) + "\n" for i in range(200)))

    def fields(source: str = "", **data: Any) -> dict[str, Any]:
        config = make_config({"data": {"corpus": str(path), "num_streams": 1} | data}).resolved()
        template = ChatTemplate(source, "its.jinja", {}, []) if source else None
        mixture = open_mixture(config.data, lambda: "", template=template)
        identity = identity_of(config, mixture) | mixture.fingerprints()
        return {k: v for k, v in identity.items() if k.endswith(("messages_field", "train_on", "chat_template"))}

    assert fields() == {}
    one, other = (fields(f"{{{{ messages }}}}{end}", messages_field="messages") for end in "ab")
    assert one.keys() == {"data.messages_field", "data.train_on", "data.chat_template"}
    assert {name for name in one if one[name] != other[name]} == {"data.chat_template"}
    several = fields("{{ messages }}", corpus={"chats": {"corpus": str(path), "messages_field": "messages"}})
    assert several["data.corpus['chats'].messages_field"] == "messages"


def test_pairs_are_part_of_the_identity_only_where_there_are_any(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"yes {i}", "bad": f"no {i}"}) + "\n" for i in range(200)))

    def fields(**data: Any) -> dict[str, Any]:
        values = {"corpus": str(path), "num_streams": 1, "segmentation": "pack"} | data
        config = make_config({"data": values, "objective": {"name": "simpo" if data else "next_token"}}).resolved()
        identity = identity_of(config, open_mixture(config.data, lambda: ""))
        return {name: value for name, value in identity.items() if "rejected" in name}

    assert fields() == {}
    assert fields(rejected_field="bad") == {"data.rejected_field": "bad"}
    several = fields(corpus={"a": {"corpus": str(path), "rejected_field": "bad"}})
    assert several == {"data.rejected_field": None, "data.corpus['a'].rejected_field": "bad"}


def test_a_run_of_plain_text_has_the_identity_that_it_had_in_earlier_versions(tmp_path: Path):
    """A new field of the data would otherwise keep every run from being resumed: add it where it is used alone."""
    (tmp_path / "a.jsonl").write_text('{"text": "a document"}\n')

    def fields(**data: Any) -> set[str]:
        config = make_config({"data": {"corpus": str(tmp_path / "a.jsonl"), "num_streams": 1} | data}).resolved()
        return {*identity_of(config, open_mixture(config.data, lambda: ""))}

    of_data = (
        "text_field", "prompt_field", "text_separator", "validation_fraction", "epochs", "num_streams", "chunk_bytes",
        "shuffle_window", "segment_length", "segmentation", "document_mask", "restart_positions", "train_last_position",
    )  # fmt: skip
    assert fields() == {"train.seed", *(f"data.{name}" for name in of_data)}
    assert fields(segmentation="pack", shuffle_rows=True) - fields() == {"data.shuffle_rows"}
