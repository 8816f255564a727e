"""Parts of a corpus: chunks, and the documents in them."""

from dataclasses import dataclass

from data import formats


@dataclass(frozen=True)
class Chunk:
    """Bytes `begin` to `end` of the file with index `file`."""

    file: int
    begin: int
    end: int


@dataclass(frozen=True)
class Document:
    """A document or a piece of one.

    Attributes:
        text: the text, which is not empty.
        place: byte offset in the file (or in the content of a compressed file), or row of a .parquet.
        ends: true if the document ends with it; otherwise its next piece is in another chunk, or held out.
        prompt: text that precedes it and is not trained on.
        answers: for a conversation, the characters [begin, end) of each answer that is trained on.
        rejected: for a pair, the answer that was not chosen; the other attributes are those of the chosen one.
    """

    text: str
    file: int
    place: int
    ends: bool = True
    prompt: str = ""
    answers: formats.Answers | None = None
    rejected: formats.Sequence | None = None

    @property
    def characters(self) -> int:
        """The number of its characters, those of a rejected answer included."""
        return len(self.prompt) + len(self.text) + (len(self.rejected.text) if self.rejected else 0)
