"""Text to batches: corpora, tokenizers, the order of the data, segments and the loader.

The inner rooms import one way: errors, printable and config, then files, formats, tokenizer, then the modules here.
May import `settings`; only `loader` imports JAX.

- document: one text of the corpus, ended by one EOS token.
- chunk: a part of the corpus that is read as a unit (`corpus`).
- stream: one of V virtual readers (`stream`), whose number never depends on the machines.
- window: consecutive documents of a stream that are shuffled together.
- segment, row: `segment_length` consecutive positions; one row of a global batch is one segment (`segmenter`).
- position: a few numbers that say where a stream's next row begins.
"""
