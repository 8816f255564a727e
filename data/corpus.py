"""A corpus: its files, their chunks, and the documents in them.

A chunk is a byte range of a file, known from the listing alone; whatever begins in it belongs to it (a line of a
.jsonl, a row group of a .parquet, a document of a .txt with separators). A .txt without separators is one document,
and a chunk is the piece up to the beginning of the next. A compressed file is one chunk.
"""

import hashlib
import itertools
import json
import logging
from collections import deque
from collections.abc import Iterator
from functools import cached_property, lru_cache, partial
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import TYPE_CHECKING

from data import formats
from data.config import ResolvedDataConfig
from data.document import Chunk, Document
from data.errors import BadText, ChangedFile, Fault, InputError
from data.files.listing import File, fingerprint, is_local, list_files
from data.formats import parquet, text
from data.printable import printable_name

if TYPE_CHECKING:
    from data.formats.template import ChatTemplate

log = logging.getLogger("ziggurat")

# A local corpus up to this size is hashed and checked for damage as a whole.
SMALL_CORPUS_BYTES = 2**28
MIN_CHUNK_BYTES = 256
# By default the chunks have MOST_CHUNK_BYTES. Where they hold whole documents, a corpus is cut into CHUNKS of them, or
# as many as have LEAST_CHUNK_BYTES each, which is what the first request for a remote file reads: a stream's window is
# then of many places, and few streams learn from more of the corpus (docs/data.md has what that buys).
CHUNKS, LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = 2**14, 2**16, 2**20
# With fewer .txt files, their ends are held out instead of whole files.
MANY_FILES = 20
# Held-out text is read in pieces of about this size.
HELD_OUT_PIECE_BYTES = 2**16
# Parts of the corpus that give held-out documents in turn.
PARTS_AT_ONCE = 8
# Number of epochs whose order is cached: streams reach the next one at different times.
CACHED_ORDERS = 4
MAX_PROBLEMS = 10
# A separator is looked for in this much text of this many files.
SEPARATED_BYTES, SEPARATED_FILES = 2**22, 16
# Below this number of files per stream, the footers of .parquet files are read for the chunks.
FILES_PER_STREAM = 4


def stable_hash(*parts: int | str) -> int:
    """Returns a 64-bit hash of some parts that is the same on every machine."""
    return _hash(json.dumps(parts))


def unit_hash(text: str) -> float:
    """Returns a number in [0, 1) determined by a text: `stable_hash("held out", text) / 2**64`, written out for speed.

    Texts below `validation_fraction` are held out. Serializing a tuple would take longer than the hash.
    """
    return _hash(f'["held out", {encode_basestring_ascii(text)}]') / 2**64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class Corpus:
    """Files of text, each cut into chunks. Made by `open_corpus`.

    Attributes:
        size: total size of the files in bytes.
        chunks: chunks of all files, in order.
        order: function (seed, epoch) → chunks in the order in which they are dealt to the streams.
        shared: true if there are fewer chunks than streams: each stream reads all of them and takes its share of
            documents.
        field: name of its setting in messages.
        skipped: (file, place) of each unreadable document that was skipped; (file, problem) for the rest of a file.
    """

    def __init__(
        self,
        files: list[File],
        config: ResolvedDataConfig,
        field: str = "data.corpus",
        template: "ChatTemplate | None" = None,
    ):
        self.files, self.field, self._config = files, field, config
        self.size = sum(file.size for file in files)
        conversations = None
        if config.messages_field is not None:
            assert template is not None, "conversations need a template"
            conversations = formats.Conversations(
                config.messages_field,
                template,
                last_only=config.train_on == "last" or config.rejected_field is not None,
            )
        self._fields = formats.Fields(
            config.text_field, config.prompt_field, config.text_separator, conversations, config.rejected_field
        )
        self.skipped: set[tuple[int, int | str]] = set()
        # The byte at which each file's training part ends.
        self._ends = [file.size for file in files]
        if config.validation_fraction:
            self._hold_out()
        self.chunks = [
            Chunk(number, begin, end)
            for number, file in enumerate(files)
            for begin, end in itertools.pairwise(self._borders(file, self._ends[number]))
        ]
        self.shared = len(self.chunks) < config.num_streams
        self.order = lru_cache(CACHED_ORDERS)(partial(self._shuffled, "chunk"))

    def _hold_out(self) -> None:
        """Holds out some of many .txt files without separators, and the ends of a few."""
        texts = [number for number, file in enumerate(self.files) if self._is_one_document(file) and file.size]
        if len(texts) >= MANY_FILES:
            smallest = min(texts, key=lambda number: unit_hash(self.files[number].name))
            for number in texts:
                if number == smallest or self._is_held_out(self.files[number].name):
                    self._ends[number] = 0
            return
        for number in texts:
            file = self.files[number]
            if not _is_compressed(file):
                # The held-out end begins at a line, or inside a very long one.
                wanted = round(file.size * (1 - self._config.validation_fraction))
                begin = text.piece_start(file, wanted, file.size)
                self._ends[number] = begin if begin < file.size else text.next_character(file, wanted, file.size)

    def _borders(self, file: File, end: int) -> list[int]:
        """Returns the bytes at which a file's chunks begin and end."""
        if not end:
            return []
        if _is_compressed(file):
            return [0, end]
        if file.name.endswith(".parquet") and len(self.files) < FILES_PER_STREAM * self._config.num_streams:
            # Few files: their row groups are looked up, so that no stream has chunks without any.
            # Groups without rows may have any place; with borders that rise, each group is still in one chunk.
            return sorted([0, *parquet.read_footer(file).begins[1:], end])
        return [*range(0, end, self._chunk_bytes(file)), end]

    def _chunk_bytes(self, file: File) -> int:
        """Returns the size of the chunks of a file that is cut into ranges of bytes."""
        size = self._config.chunk_bytes
        if size is None:
            # A piece of a .txt is trained on as a document of its own, and a range of a .parquet has its row groups.
            has_lines = file.name.endswith((".jsonl", ".txt")) and not self._is_one_document(file)
            least = LEAST_CHUNK_BYTES if has_lines else MOST_CHUNK_BYTES
            size = min(max(self.size // CHUNKS, least), MOST_CHUNK_BYTES)
        return max(min(size, self.size // (4 * self._config.num_streams)), MIN_CHUNK_BYTES)

    def _shuffled(self, *key: int | str) -> list[Chunk]:
        return [self.chunks[i] for i in sorted(range(len(self.chunks)), key=lambda i: stable_hash(*key, i))]

    def _is_one_document(self, file: File) -> bool:
        return formats.format_and_compression(file.name)[0] == ".txt" and self._config.text_separator is None

    def _is_held_out(self, key: str) -> bool:
        return unit_hash(key) < self._config.validation_fraction

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the files' names, sizes and content, or of what identifies the content of a large corpus."""
        whole = self.size <= SMALL_CORPUS_BYTES
        try:
            return hashlib.sha256("".join(fingerprint(file, whole) for file in self.files).encode()).hexdigest()
        except BadText as error:
            raise _error_of(f"{self.field}: a file", error) from None

    def describe(self) -> str:
        """Returns one line that describes the corpus."""
        names = printable_name(self.files[0].name) if len(self.files) == 1 else f"{len(self.files):,} files"
        return f"{names}, {self.size / 1e6:,.1f} MB in {len(self.chunks):,} chunks"

    def order_problem(self) -> str:
        """Returns a line where documents come nearly in the order of the files, and otherwise an empty text."""
        window = self._config.shuffle_window
        if not self.shared or self.size <= window:
            return ""
        return (
            f"{self.field} has fewer chunks ({len(self.chunks)}) than data.num_streams = "
            f"{self._config.num_streams}, so documents come nearly in the order of the files, and only those of "
            f"data.shuffle_window = {window:,} characters are shuffled together; store it uncompressed or in "
            f"{self._config.num_streams} files or more (a .parquet in as many row groups), or raise data.shuffle_window"
        )

    def documents(self, chunk: Chunk, place: int = 0) -> Iterator[Document]:
        """Yields the training documents and pieces that begin in a chunk, from a place on.

        Raises:
            InputError: a document cannot be read, with file and place, unless `on_bad_document` is "skip".
        """
        held_out_by_file = self._is_one_document(self.files[chunk.file])
        for document in self._all(chunk.file, chunk.begin, chunk.end, place):
            if held_out_by_file or not self._is_held_out(document.prompt + document.text):
                yield document

    def held_out(self) -> Iterator[Document]:
        """Yields the held-out documents, in an order in which the first of them are a sample of the corpus.

        The parts of the corpus come in the order of a hash, whatever the seed, and a few of them give a document each
        in turn. No more of a part is read than its documents need.
        """
        if not self._config.validation_fraction:
            return
        parts = iter(sorted(self._held_out_parts(), key=lambda part: stable_hash("part", part.file, part.begin)))
        open_parts: deque[Iterator[Document]] = deque(map(self._held_out_of, itertools.islice(parts, PARTS_AT_ONCE)))
        while open_parts:
            documents = open_parts.popleft()
            if (document := next(documents, None)) is not None:
                yield document
                open_parts.append(documents)
            else:
                open_parts.extend(map(self._held_out_of, itertools.islice(parts, 1)))

    def _held_out_parts(self) -> Iterator[Chunk]:
        """Yields the chunks that may hold held-out documents, and the pieces of held-out .txt."""
        yield from (chunk for chunk in self.chunks if not self._is_one_document(self.files[chunk.file]))
        for number, (file, end) in enumerate(zip(self.files, self._ends, strict=True)):
            if self._is_one_document(file) and end < file.size:
                step = file.size if _is_compressed(file) else HELD_OUT_PIECE_BYTES
                for begin in range(end, file.size, step):
                    yield Chunk(number, begin, min(begin + step, file.size))

    def _held_out_of(self, part: Chunk) -> Iterator[Document]:
        if self._is_one_document(self.files[part.file]):
            return self._all(part.file, part.begin, part.end, last=self.files[part.file].size)
        documents = self._all(part.file, part.begin, part.end)
        return (document for document in documents if self._is_held_out(document.prompt + document.text))

    def training_texts(self, seed: int) -> Iterator[str]:
        """Yields texts and prompts of training documents, chunk by chunk in an order determined by the seed.

        A conversation gives what is between its marks.
        """
        conversations = self._fields.conversations
        for chunk in self._shuffled("sample", seed):
            for document in self.documents(chunk):
                texts = conversations.texts(document.text) if conversations else (document.prompt, document.text)
                yield from filter(None, texts)

    def all_documents(self) -> Iterator[Document]:
        """Yields every document whole, training or held out, in the order of the listing."""
        for number, file in enumerate(self.files):
            yield from self._all(number, 0, file.size, last=file.size)

    def check(self) -> None:
        """Reads a local corpus of moderate size once, and of any corpus the beginnings of a few files with separators.

        Raises:
            InputError: some documents are damaged (names up to ten problems), or there are too few to train on.
        """
        self._check_separator()
        if self.size > SMALL_CORPUS_BYTES or not all(map(is_local, self.files)):
            return
        problems: list[str] = []
        # Skipped documents are logged when they are read.
        for number, file in enumerate(self.files if self._config.on_bad_document == "error" else []):
            try:
                deque(self._all(number, 0, file.size, last=file.size), maxlen=0)
            except InputError as error:
                problems.append(str(error))
            if len(problems) == MAX_PROBLEMS:
                break
        if problems:
            raise InputError("\n".join(problems))
        # Streams that share chunks need a document each; other streams may have theirs in another epoch.
        least = self._config.num_streams if self.shared else 1
        number = sum(1 for _ in itertools.islice((d for c in self.chunks for d in self.documents(c)), least))
        if not number:
            raise InputError(
                f"{self.field} has no document to train on: all of its text is empty or held out "
                f"(data.validation_fraction = {self._config.validation_fraction}); give more text, or hold out less"
            )
        if number < least:
            raise InputError(
                f"{self.field} has {number} documents or pieces to train on, too few for data.num_streams = {least}; "
                "lower data.num_streams (and train.batch_size), or give more text"
            )

    def _check_separator(self) -> None:
        """Warns where no beginning of a few .txt files has a separator."""
        texts = [file for file in self.files if formats.format_and_compression(file.name)[0] == ".txt"]
        if self._fields.separator is None or not texts:
            return
        looked_at = texts[:SEPARATED_FILES]
        if not any(formats.has_separator(file, self._fields.separator, SEPARATED_BYTES) for file in looked_at):
            log.warning(
                "data.text_separator = %r separates nothing in the first %d MiB of %d files of %s: where it never "
                "does, a .txt is one document; a separator is a whole line, spaces included",
                self._fields.separator,
                SEPARATED_BYTES >> 20,
                len(looked_at),
                self.field,
            )

    def _all(self, number: int, begin: int, end: int, place: int = 0, last: int = 0) -> Iterator[Document]:
        """Yields the documents that begin in a range of a file, or a piece of a .txt.

        Args:
            last: byte at which the last piece of a .txt ends; 0: its training part does.
        """
        file = self.files[number]
        if self._is_one_document(file) and not _is_compressed(file):
            yield from self._piece(number, begin, end, last or self._ends[number])
            return
        try:
            for at, content in formats.read_documents(file, begin, end, self._fields, place):
                if isinstance(content, BadText):
                    self.refuse(number, at, content)
                elif content.text:
                    _, prompt, answers, rejected = content
                    yield Document(content.text, number, at, prompt=prompt, answers=answers, rejected=rejected)
        except BadText as error:
            self.refuse(number, None, error)

    def _piece(self, number: int, begin: int, end: int, last: int) -> Iterator[Document]:
        """Yields a piece of a .txt, cut after the lines at `begin` and `end`, unless it is empty."""
        file = self.files[number]
        try:
            # The held-out end may begin inside a line.
            start, end = (at if at == self._ends[number] else text.piece_start(file, at, last) for at in (begin, end))
            if start < end and (content := text.read_text(file, start, end)):
                yield Document(content, number, start, ends=end == file.size)
        except BadText as error:
            self.refuse(number, begin, error)

    def refuse(self, number: int, place: int | None, problem: BadText) -> None:
        """Raises InputError, or logs once that a document (or, without a place, the rest of a chunk) is skipped."""
        file, skips = self.files[number], self._config.on_bad_document == "skip"
        key = (number, str(problem) if place is None else place)
        if skips and key in self.skipped:
            return
        where = printable_name(file.path)
        if place is not None:
            # Counting the lines before a place would read them all.
            where += formats.written_place(file, place, counts_lines=len(self.skipped) < MAX_PROBLEMS)
        if not skips:
            skip = "; mend it, or leave it out with data.on_bad_document=skip"
            # A command line that names a corpus by another flag has none to skip its documents.
            raise _error_of(f"{where}:", problem, skip if self.field.startswith("data.") else "; mend it")
        self.skipped.add(key)
        log.warning("skipped %s: %s", where, problem)


def _error_of(place: str, problem: BadText, remedy: str = "") -> InputError | Fault:
    """Returns the error that ends the run at a problem: a changed file is a fault, for a new start may go on."""
    if isinstance(problem, ChangedFile):
        return Fault(f"{place} {problem}; put it back as it was, and start again")
    return InputError(f"{place} {problem}{remedy}")


def _is_compressed(file: File) -> bool:
    return formats.format_and_compression(file.name)[1] != ""


def open_corpus(
    where: str,
    config: ResolvedDataConfig,
    leave_out: Path | None = None,
    field: str = "data.corpus",
    template: "ChatTemplate | None" = None,
) -> Corpus:
    """Opens a file, a folder (with its subfolders) or a glob, on a local disk (~ is home) or wherever fsspec reads.

    Args:
        leave_out: a folder whose files are ignored (the run's own), unless the corpus is inside it.
        field: name of the setting in messages.
        template: writes conversations as texts; needed with `config.messages_field`.

    Raises:
        InputError: there is nothing, or nothing readable.
    """
    files = list_files(where, formats.ENDINGS, leave_out, field)
    texts = [file.name for file in files if formats.format_and_compression(file.name)[0] == ".txt"]
    kinds = {
        "conversations (data.messages_field)": config.messages_field,
        "pairs (data.rejected_field)": config.rejected_field,
    }
    for kind in (kind for kind, value in kinds.items() if value is not None and texts):
        raise InputError(
            f"{field} = {where}: {printable_name(texts[0])} holds no {kind}, as a .jsonl or .parquet does; leave it out"
        )
    try:
        corpus = Corpus(files, config, field, template)
    except BadText as error:
        raise _error_of(f"{field} = {where}: a file", error) from None
    if not corpus.size:
        raise InputError(f"{field} = {where}: there is no text in it")
    return corpus
