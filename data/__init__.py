"""From text to segments: corpus, tokenizer, segmenter, and the order in which they are read."""
