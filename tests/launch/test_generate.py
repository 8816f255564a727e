"""`ziggurat generate`: many prompts from JSONL, stop strings, seeds, devices, and everything wrong at once."""

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch.generate
from data.errors import InputError
from data.tokenizer.folder import load_tokenizer
from tests.launch.small_run import here

PROMPTS = ["the cat", "a dog sees my", "", "one fish likes the bird. my cat"]


def write_prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(PROMPTS)))
    return file


def lines(capsys, *arguments: object) -> list[dict]:
    assert here("generate", *arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_many_prompts_are_continued_in_their_order_each_as_alone(finished: Path, tmp_path: Path, capsys, caplog):
    file = write_prompts(tmp_path)
    flags = ("--greedy", "--max_new_tokens=20", "--repetition_penalty=1.2")
    found = lines(capsys, finished, f"--prompts={file}", "--batch_size=3", *flags)
    assert [(line["prompt"], line["id"]) for line in found] == [(prompt, i) for i, prompt in enumerate(PROMPTS)]
    assert all(line["ended"] == ("length" if line["tokens"] == 20 else "eos") for line in found)
    assert "4 of 4 prompts" in caplog.text
    for line in found[:2]:
        assert here("generate", finished, f"--prompt={line['prompt']}", *flags) == 0
        assert capsys.readouterr().out == line["prompt"] + line["text"]


def test_a_text_ends_before_the_stop_string(finished: Path, tmp_path: Path, capsys):
    file = write_prompts(tmp_path)
    flags = (f"--prompts={file}", "--seed=7", "--top_k=3", "--max_new_tokens=20")
    free = lines(capsys, finished, *flags)
    assert lines(capsys, finished, *flags) == free
    # Of two letters, which may be of two tokens.
    stop = next(
        text[i : i + 2] for text in (free[0]["text"],) for i in range(4, 30) if text.index(text[i : i + 2]) == i
    )
    found = lines(capsys, finished, *flags, f"--stop={stop}", "--stop=\x00")
    for line, whole in zip(found, free, strict=True):
        if stop in whole["text"]:
            assert (line["text"], line["ended"]) == (whole["text"][: whole["text"].index(stop)], "stop")
            assert line["tokens"] <= whole["tokens"]
        else:
            assert line == whole


def test_a_text_ends_at_every_token_that_the_weights_name(finished: Path, tmp_path: Path, capsys):
    shutil.copytree(finished / "export", tmp_path / "weights")
    (tmp_path / "weights" / "tokenizer.model").unlink()  # which names one such token
    flags = (tmp_path / "weights", f"--prompts={write_prompts(tmp_path)}", "--greedy", "--max_new_tokens=20")
    free = lines(capsys, *flags)[0]
    tokenizer = load_tokenizer(tmp_path / "weights")
    ids = tokenizer.encode(PROMPTS[0] + free["text"]).tolist()[len(tokenizer.encode(PROMPTS[0])) :]
    place = next(i for i, token in enumerate(ids) if i > 2 and token not in ids[:i])
    file = tmp_path / "weights" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [tokenizer.eos_id, ids[place]]}))
    found = lines(capsys, *flags)[0]
    assert (found["text"], found["ended"]) == (tokenizer.decode(ids[:place]), "eos")


def test_devices_share_a_model_and_give_the_same_text(finished: Path, capsys):
    texts = []
    for flags in ((), ("--mesh.tensor=2", "--mesh.fsdp=-1")):
        assert here("generate", finished / "export", "--prompt=the cat", "--seed=1", "--max_new_tokens=12", *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_in_8_bits_a_text_is_as_long_and_begins_with_its_prompt(finished: Path, tmp_path: Path, capsys):
    flags = (f"--prompts={write_prompts(tmp_path)}", "--greedy", "--max_new_tokens=6")
    assert [line["tokens"] for line in lines(capsys, finished, "--int8", *flags)] == [
        line["tokens"] for line in lines(capsys, finished, *flags)
    ]


BAD = [
    (["--prompt=a", "--top_p=0", "--stop=", "--repetition_penalty=-1", "--batch_size=2"],
     ["--top_p=0.0 must be", "--stop is empty", "--repetition_penalty=-1.0", "--batch_size has no effect"]),
    (["--prompt=a", "--temperature=1e38", "--repetition_penalty=1e-40", "--max_new_tokens=3000000000"],
     ["--temperature=1e+38 must", "--repetition_penalty=1e-40 must", "--max_new_tokens=3000000000 must be from 1"]),
    ([], ["give --prompt=TEXT, or --prompts=FILE"]),
    (["--prompt=a", "--prompts=-"], ["give --prompt=TEXT, or --prompts=FILE"]),
    (["--prompts={dir}/none", "--greedy", "--top_p=0.5"], ["none cannot be read", "--top_p has no effect"]),
    (["--prompts={dir}/bad.jsonl"], [f"bad.jsonl:{number}: no JSON" for number in (2, 4, 5, 6, 7)]),
    (["--prompts={dir}/empty.jsonl"], ["empty.jsonl has no prompts"]),
    (["--prompt=a", "--mesh.tensor=8"], ["model.num_kv_heads = 4 cannot be shared by mesh.tensor = 8; nearest size"]),
    (["--prompt=a", "--mesh.tensor=9"], ["mesh.tensor × mesh.fsdp = 9, but there are 8 devices"]),
    (["--prompt=a", "--mesh.tensor=-1", "--mesh.fsdp=-1"], ["are both -1"]),
    (["--prompt=a", "--int8", "--mesh.tensor=2"], ["--int8 is for one CPU"]),
    (["--prompt=a", "--mesh.tensor=0"], ["--mesh.tensor=0 must be at least 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "words"), BAD, ids=lambda value: " ".join(value)[:40])
def test_all_that_is_wrong_is_told_at_once(flags: list, words: list, finished: Path, tmp_path: Path, capsys, caplog):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n["a"]\n\n{"prompt": 1}\n{"prompt": "\\ud800"}\n'
                                      '{"prompt": "b", "more": "\\ud800"}\n' + "[" * 10**5)  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("\n")
    assert here("generate", finished, *(flag.format(dir=tmp_path) for flag in flags)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in words:
        assert word in captured.err + caplog.text


def test_prompts_without_an_end_are_refused(monkeypatch):
    monkeypatch.setattr(launch.generate, "LARGEST_FILE", 100)
    with pytest.raises(InputError, match="more than 100 bytes"):
        launch.generate.read_prompts("/dev/zero")


def test_prompts_come_from_standard_input(finished: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}\n')))
    [line] = lines(capsys, finished, "--prompts=-", "--max_new_tokens=2")
    assert line["prompt"] == "a"
