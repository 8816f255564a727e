"""Read a corpus, train a tokenizer on it, and look at the batches that a model would be trained on.

python examples/look_at_batches.py PATH        (a file, folder or glob of .txt, .jsonl or .parquet)
"""

import sys
import tempfile
from pathlib import Path

import jax

from data.loader import Loader
from data.mixture import open_mixture
from data.tokenizer.training import train_tokenizer
from train.config.reading import make_config

# Four rows of 32 tokens a batch. Each row is read by a stream of its own, so that the order never depends on machines.
settings = {"data": {"corpus": sys.argv[1], "segment_length": 32}, "train": {"batch_size": 4}}
config = make_config(settings).resolved()

mixture = open_mixture(config.data, stdlib=lambda: "")
[source] = mixture.sources
documents = list(source.corpus.all_documents())
print(f"{len(documents)} documents, {sum(len(document.text) for document in documents):,} characters")

with tempfile.TemporaryDirectory() as folder:
    tokenizer = train_tokenizer([document.text for document in documents], 1000, Path(folder) / "tokenizer")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Loader(mixture, tokenizer, config.data, seed=0, batch_sizes=[4, 4], sharding=device) as batches:
        for step, loaded in enumerate(batches, start=1):
            for row in range(4):
                tokens, targets = (loaded.batch[name][row].tolist() for name in ("tokens", "targets"))
                # Documents are packed one after another; a token attends only to tokens with the same segment id.
                documents_in_row = set(loaded.batch["segment_ids"][row].tolist())
                print(f"\nstep {step}, row {row}, documents in it: {len(documents_in_row)}")
                print(f"  input   {tokenizer.decode(tokens)!r}")
                print(f"  target  {tokenizer.decode(targets)!r}")
