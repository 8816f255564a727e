"""Tokenizers: one interface, SentencePiece and Hugging Face behind it, training, and export to other formats.

May import `data.errors` and `data.files`.

- piece: the text of one token id in the vocabulary.
- part: a stretch of a text that can be encoded independently of the rest.
- byte fallback: tokens for single bytes, so that every text has tokens.
"""
