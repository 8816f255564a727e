"""The corpus: its listing, its chunks, and the documents in them.

A chunk is a byte range of a file, known from the listing alone. What begins in it belongs to it: a line of a .jsonl,
which is a document; of a .txt, which is one document, the piece up to where the next chunk's begins.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
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
    """

    def __init__(self, root: Path, names: list[str], config: DataConfig):
        self.names = names
        self._paths = [root / name for name in names]
        self._config = config
        self._sizes = [path.stat().st_size for path in self._paths]
        self.size = sum(self._sizes)
        texts = [file for file, name in enumerate(names) if name.endswith(".txt")]
        held_out = (
            {file for file in texts if self._is_held_out(self.names[file])} if len(texts) >= MANY_FILES else set()
        )
        # Where each file's training part ends.
        self._ends = list(self._sizes)
        for file in texts:
            if len(texts) >= MANY_FILES:
                self._ends[file] = 0 if file in held_out else self._sizes[file]
            elif config.validation_fraction:
                wanted = round(self._sizes[file] * (1 - config.validation_fraction))
                self._ends[file] = text.cut(self._paths[file], wanted, self._sizes[file])
        assert config.num_streams is not None
        step = max(min(config.chunk_bytes, self.size // (4 * config.num_streams)), SMALLEST_CHUNK)
        self.chunks = [
            Chunk(file, begin, min(begin + step, end))
            for file, end in enumerate(self._ends)
            for begin in range(0, end, step)
        ]

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
        """The held-out documents; of few .txt files, their ends."""
        for path, end, size in zip(self._paths, self._ends, self._sizes, strict=True):
            if path.suffix == ".txt":
                if end < size:
                    yield text.read(path, end, size)
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
        """Read a corpus of moderate size once. InputError with up to ten of the problems in its documents."""
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


def open_corpus(where: str, config: DataConfig) -> Corpus:
    """List a .txt or .jsonl file, a folder of them (with its subfolders) or a glob.

    Args:
        where: the path.
        config: with `num_streams` given.

    Raises:
        InputError: nothing there, nothing readable, or too little text for the streams.
    """
    path = Path(where)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in FORMATS and file.is_file()]
        root = path
    elif path.is_file():
        found, root = [path], path.parent
    else:
        found = [Path(file) for file in glob.glob(where, recursive=True) if Path(file).is_file()]
        if not found:
            problem = "matches no file" if glob.has_magic(where) else "there is no such file or folder"
            raise InputError(f"data.corpus = {where}: {problem}")
        fixed = Path(*Path(where).parts[: _first_magic(where)])
        root = fixed if fixed.is_dir() else fixed.parent
    if others := [file for file in found if file.suffix not in FORMATS]:
        raise InputError(f"data.corpus = {where}: {others[0].name} is neither .txt nor .jsonl; convert or rename it")
    if not found:
        raise InputError(f"data.corpus = {where}: the folder holds no .txt or .jsonl file")
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
