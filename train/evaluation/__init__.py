"""Evaluation: held-out documents, tasks of lm-evaluation-harness, continuations, and looks inside a model.

May import `model`, `data`, and from `train` the rooms config to weights.

- held-out document: a document that a run never trains on, kept in its folder for evaluation.
- task: a benchmark of lm-evaluation-harness (`evaluation.tasks`).
- bits per byte: summed loss in bits divided by the UTF-8 bytes of the text, whatever the tokenizer.
"""
