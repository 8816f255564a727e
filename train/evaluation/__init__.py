"""Evaluation: held-out documents, tasks of lm-evaluation-harness, continuations, and looks inside the model."""
