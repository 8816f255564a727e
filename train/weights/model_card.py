"""The README.md of exported weights: their model, training data, scores, and how to open them."""

import os
import re
from importlib.metadata import version
from typing import Any

from data.printable import shown
from model.parameters import parameters_text
from train.config.config import public
from train.run.events import read_events
from train.run.folder import Run
from train.run.step_log import held_out_figure, read_metrics
from train.step.schedule import rows_between
from train.weights.weight_source import WeightSource


def model_card(weights: WeightSource, run: Run | None = None) -> str:
    """Returns the text of the card in Hugging Face's format, without a run for weights that were converted."""
    facts = {"parameters": parameters_text(weights.config), **_model(weights)}
    if run is not None and weights.step:
        facts |= _training(run, weights.step)
    elif run is not None:
        facts |= _merged(run)
    facts["written by"] = f"Ziggurat {version('ziggurat')}"
    rows = "\n".join(f"| {name} | {cell(value)} |" for name, value in facts.items())
    architecture = weights.interchange().architecture
    auto, tag, kind = "AutoModelForCausalLM", "text-generation", "decoder-only language model"
    if weights.config.reward_head:
        auto, tag, kind = "AutoModelForSequenceClassification", "text-classification", "reward model"
    return f"""---
library_name: transformers
pipeline_tag: {tag}
tags: [ziggurat]
---
# {cell(os.path.basename(os.path.realpath(run.folder))) if run else architecture}

A {kind}, in the layout of Transformers' `{architecture}`. No license is stated here: whoever
publishes it adds one.

| | |
| --- | --- |
{rows}

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")
```
"""


def cell(value: Any) -> str:
    """Returns a value as text in Markdown, where names of others are no markup."""
    return re.sub(r"([\\`*<>\[\]|&])", r"\\\1", " ".join(shown(str(value)).split()))


def _model(weights: WeightSource) -> dict[str, str]:
    config = weights.config
    heads = f"{config.num_heads} heads of {config.head_dim}"
    if config.num_kv_heads != config.num_heads:
        heads += f" on {config.num_kv_heads} of keys and values"
    inner = f"feed-forward {config.feedforward_dim}"
    if config.num_experts:
        inner = f"{config.experts_per_token} of {config.num_experts} experts of {config.expert_dim} for each token"
    gated = "gated " if config.gated else ""
    tied = ", tied" if config.tie_embeddings else ""
    return {
        "size": f"{config.num_layers} layers of width {config.model_dim}, {heads}, {inner}",
        "choices": f"{config.position} positions, {config.norm} ({config.norm_placement}), {gated}{config.activation}",
        "vocabulary": f"{config.vocab_size:,}{tied}",
        "context": f"{weights.context:,} tokens",
    }


def _merged(run: Run) -> dict[str, str]:
    """Returns the checkpoints that a merged run is the average of; nothing for an imported one."""
    merges = [event for event in read_events(run.events) if event["event"] == "merge"]
    if not merges:
        return {}
    names = (
        f"{os.path.basename(origin['run'])}@{origin['step']} × {origin['weight']:.4g}" for origin in merges[-1]["of"]
    )
    return {"average of": ", ".join(names), "weights of the average": merges[-1]["scheme"]}


def _training(run: Run, step: int) -> dict[str, Any]:
    """Returns the facts of training from the run's own files."""
    config = public(run.load_config())
    starts = [event for event in read_events(run.events) if event["event"] == "start"]
    tokens = rows_between(config, 0, step) * config.data.segment_length
    corpus = config.data.corpus
    facts = {
        "training": f"{step:,} steps, {tokens:,} tokens, padding included",
        "corpus": ", ".join(corpus) if isinstance(corpus, dict) else corpus or "none",
        "fingerprint of the data": str(starts[-1].get("data", "not known"))[:12] if starts else "not known",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate}",
    }
    if origin := config.train.init_from:
        facts["begun with"] = f"{origin} ({config.train.init_with})"
    for record in read_metrics(run.metrics):
        if record["step"] == step and {"validation_loss", "validation_bits_per_byte"} <= record.keys():
            bits, loss = held_out_figure(record, "bits_per_byte"), held_out_figure(record, "loss")
            facts["held-out text"] = f"{bits:.4f} bits a byte, loss {loss:.4f} nats a token"
        if "validation_preference_accuracy" in record and step == record["step"]:
            accuracy = held_out_figure(record, "preference_accuracy")
            facts["held-out pairs"] = f"{accuracy:.1%} of {held_out_figure(record, 'pairs'):,.0f} in the right order"
    return facts
