"""Models in the names and layouts of other programs, in both directions: Hugging Face Transformers and llama.cpp.

`huggingface.Interchange` exports and imports a model; `gguf` renames an export for llama.cpp. May import `settings` and
the modules of `model`.

- family: one class of Transformers (`family.Family`), with its config keys, tensors and choices.
- widened: a model with everything that its class always has. Biases that the model does without are written as zeros,
  and fixed positions as a table: its fillings. Embeddings scaled by √D are written scaled if the class does not scale
  them.
- own fields: fields of the model that widening changes; config.json holds them under "ziggurat", so that an import
  gives the same model.
- hf_config: the values of a config.json.
"""
