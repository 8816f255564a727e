"""Weights in and out: loading runs and exports, safetensors, GGUF, the model card, and import."""
