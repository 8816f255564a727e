"""A model whose weights are read on demand, from a checkpoint or an export."""

from dataclasses import dataclass
from typing import Any

from data.errors import InputError
from data.tokenizer.tokenizer import Tokenizer
from model.config import ResolvedModelConfig
from model.interchange.huggingface import Interchange
from model.interchange.tensors import ParameterReader, nested_weights


@dataclass(frozen=True)
class WeightSource:
    """A model whose weights are read on demand."""

    config: ResolvedModelConfig
    context: int  # number of positions that it was trained on at once
    tokenizer: Tokenizer
    read: ParameterReader  # returns its parameters, one layer at a time
    step: int | None = None  # of the run that trained it, if known
    converses: bool = False  # true if it was trained on conversations, with its tokenizer's template

    def __post_init__(self) -> None:
        # An id beyond the embedding would read another token's row, or none.
        ids, most = self.tokenizer.vocab_size, self.config.vocab_size
        if ids > most:
            folder = self.tokenizer.folder
            raise InputError(f"{folder}: the tokenizer has {ids} ids, the model {most}; give the model's own")

    def interchange(self) -> Interchange:
        """Returns the model in its class of Transformers. ValueError if no class has its choices."""
        return Interchange(self.config, self.context)

    def in_memory(self) -> dict[str, Any]:
        """Reads all parameters as nested float32 arrays."""
        return nested_weights(self.config, self.read)
