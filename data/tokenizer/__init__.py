"""Tokenizers: one interface, SentencePiece and Hugging Face behind it, training, and export to other formats."""
