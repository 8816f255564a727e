"""The origin of a batch: the documents of each row, by file, place and characters."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from data import formats
from data.corpus import Corpus, stable_hash
from data.files.ranges import READ_TOTALS
from data.infilling import Infilling, open_infillings
from data.mixture import CREDITS_PER_ROW, MixedStream, Mixture, Source, corpus_field
from data.printable import printable_name, without_credentials
from data.segmenter import DocumentPairs, SegmentPart, concatenate, fill_rows, sequences_in
from data.stream import Tokenize, document_pairs, fits
from data.tokenizer.tokenizer import Tokenizer

# UTF-8 bytes of each corpus that a summary samples.
SAMPLE_BYTES = 2**24
# Formats with small chunks, unless `data.chunk_bytes` makes them larger; a sample of others ends inside a chunk.
MAX_WHOLE_CHUNK = 2**21
SPLITS = ((".jsonl", ""), (".txt", ""))


def rows_of_step(
    streams: dict[int, MixedStream], begin: int, step: int, batch_size: Callable[[int], int], skips: Mapping[int, int]
) -> list[tuple[int, int, list[SegmentPart]]]:
    """Returns (row, corpus, parts) for every row of the batch of a step; none if the run ends before it with a corpus.

    Args:
        streams: all V streams, at the beginning of the batch of step `begin`.
        batch_size: function from step to the size B of its batch.
        skips: number of batches skipped before a step's own, by step.
    """
    for s in range(begin, step + 1):
        each = batch_size(s) // len(streams)
        for stream in streams.values():
            for _ in range(each * skips.get(s, 0)):
                stream.take(s)
        rows = [(b, *stream.take(s)) for v, stream in streams.items() for b in range(v * each, (v + 1) * each)]
        left = {k for stream in streams.values() for k, ended in enumerate(stream.ended) if not ended}
        if len(left | {k for _, k, parts in rows if parts}) < len(next(iter(streams.values())).ended):
            return []
    return rows


def describe_row(
    mixture: Mixture, tokenizer: Tokenizer, row: int, k: int, parts: Sequence[SegmentPart]
) -> dict[str, Any]:
    """Returns the origin of a row as plain values: "row", "corpus" (in a mixture) and "parts".

    Each part has "file"; the beginning of the document or piece as "byte" (in the file, or in the content of a
    compressed one) or "table_row" (of a .parquet); "characters", the span [begin, end) of its text that the targets
    cover; "tokens", their number; "end", true if the end of the document is one of them; and "text", the covered text.
    With a prompt, which precedes the text of a document, it also has "prompt_characters", the prompt's length; a part
    of a conversation has "trained", the spans of its text whose tokens are trained on, and "trained_tokens". A part of
    a document that is filled in the middle has "fim", the order of its pieces (PSM or SPM), and "middle", the span
    of the middle; its "characters" reach from the first to the last that is covered, and its "text" is in the order of
    training, with the names of the marks. Of a pair, both answers are parts, each with "answer", chosen or rejected.
    """
    source = mixture.sources[k]
    origin: dict[str, Any] = {"row": row} | ({"corpus": source.name} if source.name else {})
    describe = partial(_describe_part, source.corpus, tokenizer, is_pair=source.config.rejected_field is not None)
    return origin | {"parts": [*map(describe, sequences_in(parts))]}


def _describe_part(corpus: Corpus, tokenizer: Tokenizer, part: SegmentPart, is_pair: bool) -> dict[str, Any]:
    pairs, begin, end = part
    document = pairs.document
    file = corpus.files[document.file]
    tokens = pairs.targets[: len(pairs.targets) - document.ends]
    origin: dict[str, Any] = {
        "file": printable_name(without_credentials(file.path)),
        "table_row" if file.name.endswith(".parquet") else "byte": document.place,
    }
    if is_pair:
        origin["answer"] = "chosen" if pairs.rejected else "rejected"
    count = {"tokens": end - begin, "end": bool(document.ends and end == len(pairs.targets))}
    if document.answers is not None:
        return origin | _describe_conversation(tokenizer, part, count)
    if pairs.infill:
        return origin | _describe_infill(tokenizer, part, tokens[:end].tolist(), count)
    # The first of `bos_ids` is an input alone.
    before = len(tokenizer.bos_ids) - 1
    lengths = [0 if i < before else len(tokenizer.token_bytes(token)) for i, token in enumerate(tokens[:end].tolist())]
    sizes = np.cumsum([0, *lengths])
    whole = document.prompt + document.text
    encoded = whole.encode()
    if tokenizer.adds_space:
        # A space that is in no text precedes the prompt, and another one the text after it.
        behind_prompt = len(document.prompt.encode()) + 1 if document.prompt else len(encoded)
        sizes = sizes - (sizes > 0) - (sizes > behind_prompt)
    first, last = (len(encoded[: sizes[min(at, len(sizes) - 1)]].decode(errors="ignore")) for at in (begin, end))
    origin |= {"characters": [first, last]} | count
    if document.prompt:
        origin["prompt_characters"] = len(document.prompt)
    return origin | {"text": whole[first:last]}


def _describe_conversation(tokenizer: Tokenizer, part: SegmentPart, count: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rest of a part's origin where its document is a conversation, by the weights that training sees."""
    pairs, begin, end = part
    text = pairs.document.text
    _, spans_n2 = tokenizer.encode_marked(text)
    # Target k is token k + 1; the first token is shown with the first target.
    first, last = (int(spans_n2[at, 1]) if at else 0 for at in (begin, end))
    trained: list[list[int]] = []
    for k in range(begin, end):
        if pairs.trained[k]:
            since, until = max(int(spans_n2[k + 1, 0]), first), int(spans_n2[k + 1, 1])
            if trained and trained[-1][1] >= since:
                trained[-1][1] = max(until, trained[-1][1])
            else:
                trained.append([since, until])
    spans = {"trained": trained, "trained_tokens": int(np.count_nonzero(pairs.trained[begin:end]))}
    return {"characters": [first, last], **count, **spans, "text": text[first:last]}


def _describe_infill(
    tokenizer: Tokenizer, part: SegmentPart, tokens: list[int], count: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the rest of a part's origin where its document is filled in the middle; `tokens` reach to its end."""
    infill, text = part.pairs.infill, part.pairs.document.text
    # The first of `bos_ids` is an input alone.
    before = len(tokenizer.bos_ids) - 1
    texts = [i >= before and token not in infill.marks for i, token in enumerate(tokens)]
    sizes = [len(tokenizer.token_bytes(token)) if is_text else 0 for is_text, token in zip(texts, tokens, strict=True)]
    ends = [0, *itertools.accumulate(sizes)]
    spans = infill.spans(len(text))
    trained = "".join(text[first:last] for first, last in spans).encode()
    since, shown = ends[min(part.begin, len(tokens))], ""
    covered = [len(trained[:size].decode(errors="ignore")) for size in (since, ends[-1])]
    for i in range(part.begin, len(tokens)):
        if tokens[i] in infill.marks and i >= before:
            shown += trained[since : ends[i]].decode(errors="ignore") + tokenizer.pieces[tokens[i]]
            since = ends[i]
    shown += trained[since : ends[-1]].decode(errors="ignore")
    places, at = [], 0
    for first, last in spans:
        begin, end = max(covered[0], at), min(covered[1], at + last - first)
        places += [first + begin - at, first + end - at] if begin < end else []
        at += last - first
    characters = [min(places, default=infill.begin), max(places, default=infill.begin)]
    how = {"fim": "SPM" if infill.spm else "PSM", "middle": [infill.begin, infill.end]}
    return {"characters": characters, **count, **how, "text": shown}


def summarize(
    mixture: Mixture,
    tokenizer: Tokenizer,
    seed: int,
    stages: Sequence[tuple[int, int, int]],
    sample_bytes: int = SAMPLE_BYTES,
) -> list[dict[str, Any]]:
    """Summarizes each corpus from a sample of its chunks, given stages (begin, end, positions of a step) of the run.

    Returns:
        For each corpus: "corpus" (its listing), "sampled_documents" and "sampled_bytes" (UTF-8, prompts included);
        "documents", "bytes" and "tokens" (ends included) of an epoch, extrapolated from the sample by file sizes;
        "order_problem", a line if documents come nearly in the order of the files; "bytes_per_token"; "utilization",
        the share of positions with a token in rows of the sample; "trained", the share of those tokens that is trained
        on; "epochs" that the run will read; and "last_step", the step in which `epochs` of the corpus end, or None. A
        long .txt counts as several documents.
    """
    cuts = {step for source in mixture.sources for step, _ in source.weights}
    summaries = []
    infillings = open_infillings([source.config for source in mixture.sources], tokenizer, seed)
    for k, (source, infilling) in enumerate(zip(mixture.sources, infillings, strict=True)):
        config = source.config
        documents, size, stored = _sample(source, tokenizer, infilling, seed, sample_bytes)
        pairs = sum(document.length for document in documents)
        whole = config.segmentation != "concatenate"
        rows = fill_rows(documents, config) if whole else [*concatenate(documents, config)]
        scale = sum(chunk.end - chunk.begin for chunk in source.corpus.chunks) / max(stored, 1)
        utilization = pairs / max(len(rows) * config.segment_length, 1)
        epoch = max(pairs * scale, 1)
        epochs, last_step = 0.0, None
        for begin, end, positions in _cut(stages, cuts):
            of_step = positions * mixture.shares(begin)[k] / CREDITS_PER_ROW * utilization / epoch
            left = (config.epochs or np.inf) - epochs
            if last_step is None and 0 < left <= of_step * (end - begin):
                last_step = begin + round(left / of_step)
            epochs += of_step * (end - begin)
        summaries.append(
            {
                "corpus": f"{corpus_field(source.name)}: {source.corpus.describe()}",
                "sampled_documents": len(documents),
                "sampled_bytes": size,
                "documents": round(len(documents) * scale),
                "bytes": round(size * scale),
                "tokens": round(pairs * scale),
                "order_problem": source.corpus.order_problem(),
                "bytes_per_token": size / max(pairs, 1),
                "utilization": utilization,
                "trained": sum(int(s.trained.sum()) for d in documents for s in d.sequences) / max(pairs, 1),
                "epochs": epochs,
                "last_step": last_step,
            }
        )
    return summaries


def _cut(stages: Sequence[tuple[int, int, int]], cuts: set[int]) -> Iterator[tuple[int, int, int]]:
    """Yields stages (begin, end, value), each cut into several at the steps `cuts`."""
    for begin, end, value in stages:
        inside = sorted({begin, end} | {cut for cut in cuts if begin < cut < end})
        yield from ((first, last, value) for first, last in itertools.pairwise(inside))


def _sample(
    source: Source, tokenizer: Tokenizer, infilling: Infilling | None, seed: int, sample_bytes: int
) -> tuple[list[DocumentPairs], int, int]:
    """Reads a sample of a corpus: (documents, UTF-8 bytes of their text, stored bytes that were read)."""
    documents: list[DocumentPairs] = []
    size, stored, corpus = 0, 0, source.corpus
    for chunk in sorted(corpus.chunks, key=lambda c: stable_hash("summary", seed, c.file, c.begin)):
        if size >= sample_bytes:
            break
        splits = formats.format_and_compression(corpus.files[chunk.file].name) in SPLITS
        splits = splits and chunk.end - chunk.begin <= max(sample_bytes, MAX_WHOLE_CHUNK)
        before = READ_TOTALS["bytes"]
        for document in corpus.documents(chunk):
            encode: Tokenize = lambda texts: map(tokenizer.encode, texts)
            around = tokenizer.bos_ids, tokenizer.eos_id
            made = document_pairs([document], encode, *around, infilling, encode_marked=tokenizer.encode_marked)
            documents += (pairs for pairs in made if fits(corpus, source.config, pairs))
            size += len(
                (document.prompt + document.text + (document.rejected.text if document.rejected else "")).encode()
            )
            if size >= sample_bytes and not splits:
                break
        stored += chunk.end - chunk.begin if splits else READ_TOTALS["bytes"] - before
    return documents, size, stored
