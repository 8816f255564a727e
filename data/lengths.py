"""Finds documents that no row can hold, and that are never cut, before anything is trained."""

import itertools
import logging

from data.corpus import MAX_PROBLEMS, SMALL_CORPUS_BYTES
from data.errors import InputError
from data.mixture import Mixture, Source
from data.stream import document_pairs, fits
from data.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("ziggurat")
# Documents that are tokenized at once.
AT_ONCE = 256


def check_lengths(mixture: Mixture, tokenizer: Tokenizer) -> None:
    """Tokenizes all corpora of moderate size whose documents are never cut, unless long ones are to be skipped.

    Raises InputError with file and place of up to ten documents that are longer than a row.
    """
    problems: list[str] = []
    for source in mixture.sources:
        checks = source.config.on_bad_document == "error" and source.corpus.size <= SMALL_CORPUS_BYTES
        if checks and source.config.keeps_whole:
            log.info("tokenizing %s, to see that its documents fit into rows", source.corpus.describe())
            problems += _too_long(source, tokenizer, MAX_PROBLEMS - len(problems))
    if problems:
        raise InputError("\n".join(problems))


def _too_long(source: Source, tokenizer: Tokenizer, most: int) -> list[str]:
    problems: list[str] = []
    documents, around = source.corpus.all_documents(), (tokenizer.bos_ids, tokenizer.eos_id)
    while (some := list(itertools.islice(documents, AT_ONCE))) and len(problems) < most:
        for pairs in document_pairs(some, tokenizer.encode_all, *around, encode_marked=tokenizer.encode_marked):
            try:
                fits(source.corpus, source.config, pairs)
            except InputError as error:
                problems.append(str(error))
    return problems[:most]
