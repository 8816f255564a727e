"""The corpus: its listing, its chunks, and the documents in them.

A chunk is a byte range of a file, known from the listing alone. What begins in it belongs to it: a line of a .jsonl,
which is a document; of a .txt, which is one document, the piece up to where the next chunk's begins.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from data.config import DataConfig
from data.errors import InputError
from data.formats import jsonl, text

FORMATS = (".txt", ".jsonl")
# A corpus up to this size is hashed, and looked through for damage, whole; of a larger one, each file's two ends are.
WHOLE_BYTES = 2**28
END_BYTES = 2**16
SMALLEST_CHUNK = 256
# Fewer .txt files than this give their ends to the held-out part, not whole files.
MANY_FILES = 20
# Held-out text is read in pieces of about this size.
PIECE_BYTES = 2**24
# Epochs whose order is remembered: streams reach the next one at different times.
ORDERS = 4


@dataclass(frozen=True)
class Chunk:
    """Bytes `begin` to `end` of the file with this number."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True)
class Document:
    """A document or a piece of one.

    Attributes:
        text: not empty.
        file: number of its file.
        offset: byte of the file at which it begins.
        ends: whether the document ends with it; else its next piece is in another chunk, or held out.
    """

    text: str
    file: int
    offset: int
    ends: bool = True


def digest(*parts: int | str) -> int:
    """A number of 64 bits that these parts determine, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())


class Corpus:
    """Files of text, each cut into chunks. Made by `open_corpus`.

    Attributes:
        names: of the files, relative to what they have in common, sorted.
        chunks: of all files, in order.
        order: (seed, epoch) → the chunks as they are dealt to the streams.
    """

    def __init__(self, root: Path, names: list[str], config: DataConfig):
        self.names = names
        self._paths = [root / name for name in names]
        self._config = config
        self._sizes = [path.stat().st_size for path in self._paths]
        self.size = sum(self._sizes)
        # Where each file's training part ends.
        self._ends = list(self._sizes)
        texts = [file for file, name in enumerate(names) if name.endswith(".txt") and self._sizes[file]]
        if config.validation_fraction and len(texts) >= MANY_FILES:
            smallest = min(texts, key=lambda file: digest("held out", names[file]))
            for file in texts:
                if file == smallest or self._is_held_out(names[file]):
                    self._ends[file] = 0
        elif config.validation_fraction:
            for file in texts:
                self._ends[file] = self._held_out_from(file)
        assert config.num_streams is not None
        step = max(min(config.chunk_bytes, self.size // (4 * config.num_streams)), SMALLEST_CHUNK)
        self.chunks = [
            Chunk(file, begin, min(begin + step, end))
            for file, end in enumerate(self._ends)
            for begin in range(0, end, step)
        ]

        self.order = lru_cache(ORDERS)(self._order)

    def _order(self, seed: int, epoch: int) -> list[Chunk]:
        return [self.chunks[i] for i in sorted(range(len(self.chunks)), key=lambda i: digest("chunk", seed, epoch, i))]

    def _held_out_from(self, file: int) -> int:
        """Where the held-out end of a .txt begins: at a line, or in the last one where that is longer."""
        path, size = self._paths[file], self._sizes[file]
        wanted = round(size * (1 - self._config.validation_fraction))
        begin = text.cut(path, wanted, size)
        return begin if begin < size else text.next_character(path, wanted, size)

    def _is_held_out(self, key: str) -> bool:
        return digest("held out", key) < self._config.validation_fraction * 2**64

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the files' names, sizes and content (of a large corpus, of each file's two ends)."""
        found = hashlib.sha256()
        for name, path, size in zip(self.names, self._paths, self._sizes, strict=True):
            found.update(json.dumps([name, size]).encode())
            with path.open("rb") as file:
                if self.size <= WHOLE_BYTES:
                    found.update(file.read())
                else:
                    found.update(file.read(END_BYTES))
                    file.seek(max(size - END_BYTES, 0))
                    found.update(file.read())
        return found.hexdigest()

    def describe(self) -> str:
        """One line for a person."""
        what = self.names[0] if len(self.names) == 1 else f"{len(self.names)} files"
        return f"{what}, {self.size / 1e6:.1f} MB in {len(self.chunks)} chunks, fingerprint {self.fingerprint[:12]}"

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        """The training documents and pieces that begin in a chunk.

        Raises:
            InputError: bytes that are no UTF-8, a line that is no JSON or has no such field; names file and place.
        """
        path = self._paths[chunk.file]
        if path.suffix == ".txt":
            end = self._ends[chunk.file]
            begin, stop = (text.cut(path, at, end) for at in (chunk.begin, chunk.end))
            if begin < stop:
                yield Document(text.read(path, begin, stop), chunk.file, begin, ends=stop == self._sizes[chunk.file])
            return
        for offset, content in jsonl.read(path, chunk.begin, chunk.end, self._config.text_field):
            if content and not self._is_held_out(content):
                yield Document(content, chunk.file, offset)

    def held_out_texts(self) -> Iterator[str]:
        """The held-out documents; of few .txt files, their ends. Of a .txt in pieces, so that none fills the memory."""
        for path, end, size in zip(self._paths, self._ends, self._sizes, strict=True):
            if path.suffix == ".txt":
                while end < size:
                    begin, end = end, text.cut(path, end + PIECE_BYTES, size)
                    yield text.read(path, begin, end)
                continue
            for _, content in jsonl.read(path, 0, size, self._config.text_field):
                if content and self._is_held_out(content):
                    yield content

    def training_texts(self, seed: int) -> Iterator[str]:
        """The training documents and pieces, chunk by chunk in an order that the seed determines."""
        for i in sorted(range(len(self.chunks)), key=lambda i: digest("sample", seed, i)):
            for document in self.documents(self.chunks[i]):
                yield document.text

    def texts(self) -> Iterator[str]:
        """Every document whole, training or held out, in the order of the listing."""
        for path, size in zip(self._paths, self._sizes, strict=True):
            if path.suffix == ".txt":
                yield text.read(path, 0, size)
            else:
                yield from (content for _, content in jsonl.read(path, 0, size, self._config.text_field) if content)

    def check(self) -> None:
        """Read a corpus of moderate size once.

        Raises:
            InputError: up to ten of the problems in its documents, or that there is none to train on.
        """
        problems: list[str] = []
        for file, (path, size) in enumerate(zip(self._paths, self._sizes, strict=True)):
            if self.size > WHOLE_BYTES or len(problems) >= 10:
                break
            try:
                if self.names[file].endswith(".txt"):
                    text.read(path, 0, size)
                else:
                    for _ in jsonl.read(path, 0, size, self._config.text_field):
                        pass
            except InputError as error:
                problems.append(str(error))
        if problems:
            raise InputError("\n".join(problems))
        if self.size <= WHOLE_BYTES and next(self.training_texts(seed=0), None) is None:
            raise InputError(
                "data.corpus has no document to train on: all of its text is empty or held out "
                f"(data.validation_fraction = {self._config.validation_fraction}); give more text, or hold out less"
            )


def open_corpus(where: str, config: DataConfig, leave_out: Path | None = None) -> Corpus:
    """List a .txt or .jsonl file, a folder of them (with its subfolders) or a glob.

    Args:
        where: the path; ~ is the home folder.
        config: with `num_streams` given.
        leave_out: a folder whose files don't count (a run's own), unless the corpus lies in it.

    Raises:
        InputError: nothing there, nothing readable, or too little text for the streams.
    """
    where = os.path.expanduser(where)
    path = Path(where)
    # Path's own is_dir and is_file fail where a name is too long.
    is_folder = os.path.isdir(where)
    if is_folder:
        found = [file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file()]
        root = path
    elif os.path.isfile(where):
        found, root = [path], path.parent
    else:
        found = [Path(file) for file in glob.glob(where, recursive=True) if Path(file).is_file()]
        root = Path(*path.parts[: _first_magic(where)])
    if found and leave_out is not None:
        left_out = leave_out.resolve()
        if not root.resolve().is_relative_to(left_out):
            found = [file for file in found if not file.resolve().is_relative_to(left_out)]
    if not found:
        if is_folder:
            problem = "the folder holds no .txt or .jsonl file"
        else:
            problem = "matches no file" if glob.has_magic(where) else "there is no such file or folder"
        raise InputError(f"data.corpus = {where}: {problem}")
    if others := [file for file in found if file.suffix not in FORMATS]:
        raise InputError(f"data.corpus = {where}: {others[0].name} is neither .txt nor .jsonl; convert or rename it")
    try:
        corpus = Corpus(root, sorted(file.relative_to(root).as_posix() for file in found), config)
    except PermissionError as error:
        raise InputError(f"data.corpus = {where}: {error.filename} cannot be read: {error.strerror}") from None
    if corpus.size == 0:
        raise InputError(f"data.corpus = {where}: there is no text in it")
    assert config.num_streams is not None
    if len(corpus.chunks) < config.num_streams:
        raise InputError(
            f"data.corpus = {where}: its {corpus.size} bytes give only {len(corpus.chunks)} chunks for "
            f"data.num_streams = {config.num_streams}; lower data.num_streams (and train.batch_size), or give more text"
        )
    return corpus


def _first_magic(where: str) -> int:
    """How many leading parts of a glob are plain names."""
    parts = Path(where).parts
    return next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
