"""Where a batch is from: the documents of each row, by file, place and characters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import formats
from data.corpus import stable_hash
from data.files.ranges import READ_TOTALS
from data.mixture import MixedStream, Mixture, corpus_field
from data.segmenter import DocumentPairs, SegmentPart, concatenate, make_pairs, pack
from data.tokenizer.tokenizer import Tokenizer

# UTF-8 bytes of each corpus that a summary looks at.
SAMPLE_BYTES = 2**24
# What has small chunks; of the others a sample ends where it has enough.
SPLITS = ((".jsonl", ""), (".txt", ""))


def rows_of_step(
    streams: dict[int, MixedStream], batch_sizes: Sequence[int], step: int, skips: Mapping[int, int]
) -> Iterator[tuple[int, int, list[SegmentPart]]]:
    """Of each row of the last of some batches, its number, its corpus and its parts.

    Args:
        streams: all V, at the beginning of the first batch.
        batch_sizes: B of each batch up to the wanted one.
        step: number (from 0) of the wanted batch's step.
        skips: step → how many batches were left out before its own.
    """
    for s, size in enumerate(batch_sizes, start=step + 1 - len(batch_sizes)):
        each = size // len(streams)
        for stream in streams.values():
            for _ in range(each * skips.get(s, 0)):
                stream.take(s)
        for v, stream in streams.items():
            for b in range(v * each, (v + 1) * each):
                k, parts = stream.take(s)
                if s == step:
                    yield b, k, parts


def describe_row(
    mixture: Mixture, tokenizer: Tokenizer, row: int, k: int, parts: Sequence[SegmentPart]
) -> dict[str, Any]:
    """A row as plain values: "row", "corpus" (of a mixture) and its "parts", each as `describe_part` says."""
    source = mixture.sources[k]
    found: dict[str, Any] = {"row": row} | ({"corpus": source.name} if source.name else {})
    return found | {"parts": [describe_part(mixture, tokenizer, k, part) for part in parts]}


def describe_part(mixture: Mixture, tokenizer: Tokenizer, k: int, part: SegmentPart) -> dict[str, Any]:
    """What part of which document stands in a row.

    Returns:
        "file"; where the document or piece begins: "byte" (of the file, or of what a compressed one holds) or
        "table_row" (of a .parquet); "characters", the span [begin, end) of its text that the targets are; "tokens", how
        many they are; "end", whether the end of the document is one of them; "text", theirs. Before the text of a
        document with a prompt stands the prompt, which is "prompt_characters" long.
    """
    pairs, begin, end = part
    document = pairs.document
    file = mixture.sources[k].corpus.files[document.file]
    tokens = pairs.targets[: len(pairs.targets) - document.ends]
    sizes = np.cumsum([0, *(len(tokenizer.token_bytes(int(token))) for token in tokens[:end])])
    whole = document.prompt + document.text
    encoded = whole.encode()
    if tokenizer.adds_space:
        # One that is in no text stands before the prompt, and one before what follows it.
        behind_prompt = len(document.prompt.encode()) + 1 if document.prompt else len(encoded)
        sizes = sizes - (sizes > 0) - (sizes > behind_prompt)
    first, last = (len(encoded[: sizes[min(at, len(sizes) - 1)]].decode(errors="ignore")) for at in (begin, end))
    found: dict[str, Any] = {
        "file": file.path,
        place_name(file.name): document.place,
        "characters": [first, last],
        "tokens": end - begin,
        "end": bool(document.ends and end == len(pairs.targets)),
    }
    if document.prompt:
        found["prompt_characters"] = len(document.prompt)
    return found | {"text": whole[first:last]}


def place_name(name: str) -> str:
    """What a document's place counts in a file of this name."""
    return "table_row" if formats.format_and_compression(name)[0] == ".parquet" else "byte"


def summarize(
    mixture: Mixture, tokenizer: Tokenizer, seed: int, tokens_of_steps: Sequence[int]
) -> list[dict[str, Any]]:
    """What each corpus holds, from a sample of its chunks.

    Args:
        mixture: the corpora.
        tokenizer: of the run.
        seed: of the sample.
        tokens_of_steps: positions of each step's batch.

    Returns:
        Of each corpus: "corpus" (its listing), "sampled_documents" and "sampled_bytes" (UTF-8, prompts included);
        "documents", "bytes" and "tokens" (ends included) of an epoch, as the sample and the sizes of the files say;
        "bytes_per_token"; "utilization", the share of positions that hold a token in rows of the sample; "epochs" that
        the run will read. A long .txt counts as several documents.
    """
    found = []
    for k, source in enumerate(mixture.sources):
        corpus, config = source.corpus, source.config
        documents: list[DocumentPairs] = []
        size = stored = 0
        for chunk in sorted(corpus.chunks, key=lambda c: stable_hash("summary", seed, c.file, c.begin)):
            if size >= SAMPLE_BYTES:
                break
            splits, before = (
                formats.format_and_compression(corpus.files[chunk.file].name) in SPLITS,
                READ_TOTALS["bytes"],
            )
            for document in corpus.documents(chunk):
                prompt, tokens = tokenizer.encode(document.prompt), tokenizer.encode(document.text)
                documents.append(
                    make_pairs(
                        np.concatenate([prompt, tokens]),
                        tokenizer.bos_id,
                        tokenizer.eos_id,
                        document.ends,
                        prompt_length=len(prompt),
                    )
                )
                size += len((document.prompt + document.text).encode())
                if size >= SAMPLE_BYTES and not splits:
                    break
            stored += chunk.end - chunk.begin if splits else READ_TOTALS["bytes"] - before
        pairs = sum(len(document.inputs) for document in documents)
        rows = (
            pack(documents, config)
            if config.segmentation == "pack"
            else [parts for parts, _ in concatenate(documents, config)]
        )
        whole = sum(chunk.end - chunk.begin for chunk in corpus.chunks) / max(stored, 1)
        drawn = sum(tokens * mixture.shares(step)[k] for step, tokens in enumerate(tokens_of_steps)) / sum(
            mixture.shares(0)
        )
        used = pairs / max(len(rows) * config.segment_length, 1)
        found.append(
            {
                "corpus": f"{corpus_field(source.name)}: {corpus.describe()}",
                "sampled_documents": len(documents),
                "sampled_bytes": size,
                "documents": round(len(documents) * whole),
                "bytes": round(size * whole),
                "tokens": round(pairs * whole),
                "bytes_per_token": size / max(pairs, 1),
                "utilization": used,
                "epochs": drawn * used / max(pairs * whole, 1),
            }
        )
    return found
