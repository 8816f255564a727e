"""Weights in and out: loading runs and exports, safetensors, GGUF, the model card, and import.

May import `model`, `data`, and from `train` the rooms config to checkpoint.

- export: a folder that Hugging Face Transformers opens, or a GGUF file for llama.cpp.
- weight source: a model whose parameters are read on demand, from a checkpoint or an export (`WeightSource`).
- imported run: a run whose only checkpoint, of step 0, holds weights from elsewhere.
"""
