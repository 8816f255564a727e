"""Settings of the data path: which text, how it becomes tokens, how tokens become segments.

Each field's metadata holds `help` (one line, with units) and `resume`: what a change of the field does when a run is
resumed. "frozen" (where nothing is said) is refused, "warn" is accepted with a warning, "free" in silence.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """The corpus, and how its documents are ordered and cut into segments."""

    corpus: str = field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the running Python's standard library) or a .txt or .jsonl file, folder or glob",
            # The fingerprint of the content decides, not the path.
            "resume": "free",
        },
    )
    text_field: str = field(default="text", metadata={"help": "name of the text's field in .jsonl lines"})
    segment_length: int = field(default=256, metadata={"help": "positions of a segment: the context window"})
    num_streams: int | None = field(
        default=None, metadata={"help": "virtual readers; divides the rows of the first batch; none: equals them"}
    )
    mask_documents: bool = field(
        default=True,
        metadata={"help": "hide other documents of a segment from attention, and restart positions in each"},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "part of the documents that is held out for evaluation"}
    )
    chunk_bytes: int = field(default=2**20, metadata={"help": "largest part of a file, in bytes, that is read as one"})
    shuffle_bytes: int = field(
        default=2**22, metadata={"help": "bytes of a stream's chunks whose documents are shuffled together"}
    )
    num_workers: int = field(
        default=0,
        metadata={"help": "processes that tokenize; 0: the loader's own thread does", "resume": "free"},
    )
    prefetch: int = field(default=2, metadata={"help": "global batches made ready ahead", "resume": "free"})

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        for name in ("segment_length", "chunk_bytes", "shuffle_bytes", "prefetch"):
            if getattr(self, name) < 1:
                found.append(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_streams is not None and self.num_streams < 1:
            found.append(f"data.num_streams is {self.num_streams}; it must be at least 1")
        if self.num_workers < 0:
            found.append(f"data.num_workers is {self.num_workers}; it must be 0 or more")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}; it must be in [0, 1)")
        if not self.corpus:
            found.append("data.corpus is empty; give 'stdlib' or a .txt or .jsonl file, folder or glob")
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    """The SentencePiece BPE tokenizer, and the sample of the corpus that it is trained on."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "folder of a tokenizer made by `ziggurat tokenize`; none: the run trains its own",
            "resume": "free",
        },
    )
    vocab_size: int = field(
        default=4096,
        metadata={"help": "pieces asked of the tokenizer; a small corpus gets as many as it supports"},
    )
    sample_bytes: int = field(default=2**23, metadata={"help": "bytes of training documents that it learns from"})

    def problems(self) -> list[str]:
        """Everything wrong with these values, one line each, naming the field."""
        found = []
        if self.vocab_size < 320:
            found.append(
                f"tokenizer.vocab_size is {self.vocab_size}; it must be at least 320: 256 bytes, "
                "the special pieces and some text"
            )
        if self.sample_bytes < 1024:
            found.append(f"tokenizer.sample_bytes is {self.sample_bytes}; it must be at least 1024")
        return found
