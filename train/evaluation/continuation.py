"""Continues texts: what `model.generation` does with tokens, for text with stop strings."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data.tokenizer.tokenizer import Tokenizer
from model.generation.generator import Generator
from model.generation.sampling import Sampling
from train.config.config import ResolvedConfig
from train.devices.rules import GENERATION


class ContinuationPart(NamedTuple):
    """A part of a continuation."""

    number: int  # of the prompt, from 0
    text: str
    tokens: int  # so far, without the end of text
    ended: str | None  # "eos", "stop" (at a stop string) or "length" for the last part


class TextStream:
    """Detokenizes one continuation as its tokens arrive, until the first of some stop strings."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop = stop
        # A character can span several tokens; its bytes wait until all have come.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.tokens = 0  # that it has taken
        self.stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that is now certain, without an end that may begin a stop string."""
        certain = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            certain += self._certain(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return certain

    def finish(self) -> str:
        """Returns the text that was held back, when no more tokens come."""
        last = "" if self.stopped else self._certain(self._decoder.decode(b"", final=True))
        return last + self._held

    def _certain(self, text: str) -> str:
        text = self._held + text
        if stops := [text.index(stop) for stop in self._stop if stop in text]:
            self.stopped = True
            self._held = ""
            return text[: min(stops)]
        longest = max(map(len, self._stop), default=1) - 1
        begins = lambda i: any(stop.startswith(text[i:]) for stop in self._stop)
        cut = next((i for i in range(max(len(text) - longest, 0), len(text)) if begins(i)), len(text))
        self._held = text[cut:]
        return text[:cut]


def make_generator(
    config: ResolvedConfig, weights: Any, tokenizer: Tokenizer, int8: bool = False, end_ids: Sequence[int] = ()
) -> Generator:
    """Makes the generator of a run or of exported weights, on the ambient mesh.

    Args:
        int8: products are of whole numbers; for one CPU.
        end_ids: tokens at which a continuation ends besides those that the tokenizer names.
    """
    # Ids without text in the tokenizer are never sampled.
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    context, eos_id = config.data.segment_length, list(dict.fromkeys([*tokenizer.stop_ids, *end_ids]))
    return Generator(model, weights, context=context, eos_id=eos_id, layout=GENERATION, int8=int8)


def continuations(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Sequence[str] = (),
    batch_size: int = 1,
) -> Iterator[ContinuationPart]:
    """Continues prompts, and yields parts as they come: in order for each prompt, the last with `ended`.

    Args:
        prompts: token ids of each prompt, from `Tokenizer.encode_with_bos`.
        seed: random seed; with the index of its prompt it decides what a continuation samples.
        stop: nonempty strings, before the first of which a text ends.
        batch_size: largest number of prompts that are continued at once.
    """
    stopped: set[int] = set()
    texts = {number: TextStream(tokenizer, stop) for number in range(len(prompts))}
    pieces = generator(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, batch_size=batch_size, stopped=stopped
    )
    for number, tokens, ended, _ in pieces:
        text = texts[number]
        added = text.add(tokens)
        if ended:
            added += text.finish()
        if text.stopped:
            stopped.add(number)
            ended = "stop"
        yield ContinuationPart(number, added, text.tokens, ended)
