"""Conversations small enough for a test, and the arguments of a run on them."""

import json
from pathlib import Path

from tests.launch.small_run import ROOT, write_config

EXAMPLE = ROOT / "examples" / "chat_template.jinja"
FLAGS = ["--config.data.segmentation=pack", "--config.data.segment_length=64"]
FLAGS += ["--config.train.num_steps=6", "--config.checkpoint.every_steps=3"]


def write_chats(file: Path) -> Path:
    """Conversations of one to three questions about animals."""
    animals = ["cat", "dog", "bird", "fish"]
    conversations = []
    for i in range(400):
        turns = [{"role": "system", "content": "be short"}] if i % 3 == 0 else []
        for j in range(1 + i % 3):
            turns.append({"role": "user", "content": f"who is {animals[(i + j) % 4]} {i}?"})
            turns.append({"role": "assistant", "content": f"my {animals[(i * j) % 4]}."})
        conversations.append({"messages": turns})
    file.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    return file


def flags_of(folder: Path) -> list[str]:
    """The arguments of a run on conversations and plain text."""
    config = write_config(folder)
    mixture = {"chats": {"corpus": str(write_chats(folder / "chats.jsonl")), "messages_field": "messages", "weight": 3}}
    mixture |= {"web": {"corpus": str(folder / "corpus.jsonl")}}
    return [f"--config={config}", f"--config.data.corpus={json.dumps(mixture)}", *FLAGS]
