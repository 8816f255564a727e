"""Texts continued: what `model.generation` does with tokens, for text, with stop strings."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from data.tokenizer.tokenizer import Tokenizer
from model.generation.generator import Generator
from model.generation.sampling import Sampling
from train.config.config import ResolvedConfig
from train.devices.rules import GENERATION


class Part(NamedTuple):
    """A part of a continuation.

    Attributes:
        number: of its prompt, from 0.
        text: what has been added to the continuation.
        tokens: how many tokens it has so far, the end of the text not among them.
        ended: "eos", "stop" (one of the stop strings came) or "length" where this is its last part.
    """

    number: int
    text: str
    tokens: int
    ended: str | None


class Unfolding:
    """The text of one continuation, as its tokens come.

    Args:
        tokenizer: of the model.
        stop: the text ends before the first of these strings.

    Attributes:
        tokens: how many it has taken.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        # A character may be several tokens: its bytes wait until they are all there.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.tokens, self.stopped = 0, False

    def add(self, tokens: Sequence[int]) -> str:
        """What is now certain of the text: without an end that may be the beginning of a stop string."""
        certain = []
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            certain.append(self._certain(self._decoder.decode(self._tokenizer.token_bytes(token))))
        return "".join(certain)

    def finish(self) -> str:
        """What was held back, where no more comes."""
        last = "" if self.stopped else self._certain(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return last + held

    def _certain(self, text: str) -> str:
        text = self._held + text
        if found := [text.index(stop) for stop in self._stop if stop in text]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stop), default=1) - 1
        begins = lambda i: any(stop.startswith(text[i:]) for stop in self._stop)
        cut = next((i for i in range(max(len(text) - longest, 0), len(text)) if begins(i)), len(text))
        self._held = text[cut:]
        return text[:cut]


def make_generator(config: ResolvedConfig, weights: Any, tokenizer: Tokenizer) -> Generator:
    """The model of a run or of exported weights, on the ambient mesh, ready to continue prompts."""
    return Generator(
        # What the tokenizer has no text for is not drawn.
        dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size),
        weights,
        context=config.data.segment_length,
        eos_id=tokenizer.eos_id,
        layout=GENERATION,
    )


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
) -> Iterator[Part]:
    """Continue prompts; yields parts as they come, those of a prompt in order, the last with why it `ended`.

    Args:
        generator: of `make_generator`.
        tokenizer: of its model.
        prompts: token ids of each, of `Tokenizer.encode_with_bos`.
        max_new_tokens: the limit of each.
        sampling: how tokens are drawn.
        seed: with the number of its prompt it decides what a continuation draws.
        stop: strings, none empty, before the first of which a text ends.
        batch_size: how many prompts are continued at once, at most.
    """
    stopped: set[int] = set()
    texts = {number: Unfolding(tokenizer, stop) for number in range(len(prompts))}
    pieces = generator(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, batch_size=batch_size, stopped=stopped
    )
    for number, tokens, ended in pieces:
        text = texts[number]
        added = text.add(tokens)
        if ended:
            added += text.finish()
        if text.stopped:
            stopped.add(number)
            ended = "stop"
        yield Part(number, added, text.tokens, ended)
