"""The reward of a sampled answer: a Python function that the user names with `objective.reward`.

It runs on the hosts, in a thread of its own, so that one that does not return ends the run with a line that says so.
"""

import importlib.util
import math
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError
from train.config.objective_config import REWARD, ObjectiveConfig


class Answer(NamedTuple):
    """The texts on which a reward depends: a prompt, an answer to it, and the answer in the corpus."""

    prompt: str
    text: str
    reference: str


class Reward:
    """The user's function. InputError if its file cannot be imported, or has no such function."""

    def __init__(self, config: ObjectiveConfig):
        assert config.reward is not None
        self._name, self._seconds = f"objective.reward = {config.reward}", config.reward_seconds
        named = REWARD.fullmatch(config.reward)
        assert named
        self._function = self._load(Path(named["file"]).expanduser(), named["function"])

    def _load(self, file: Path, function: str) -> Callable[[str, str, str], Any]:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise InputError(f"{self._name}: there is no file {file}; name a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(f"{self._name}: importing it raised {_described(error)}; mend the file") from None
        found = getattr(module, function, None)
        if not callable(found):
            raise InputError(f"{self._name}: {file} has no function {function}; name one of it")
        return found  # type: ignore[no-any-return]

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Returns the reward of each answer. InputError if the function raises, takes too long, or gives no number."""
        rewards: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            for answer in answers:
                try:
                    rewards.put(self._function(*answer))
                except (Exception, SystemExit) as error:
                    rewards.put(error)
                    return

        # The process may end while a daemon's function still runs.
        threading.Thread(target=work, daemon=True, name="reward").start()
        return [self._next(rewards, answer) for answer in answers]

    def _next(self, rewards: queue.Queue, answer: Answer) -> float:
        of = f"for the answer {shortened(answer.text)} to {shortened(answer.prompt)}"
        try:
            reward = rewards.get(timeout=self._seconds)
        except queue.Empty:
            raise InputError(
                f"{self._name} has not returned within objective.reward_seconds = {self._seconds:g} {of}; mend it, or "
                "give it more time"
            ) from None
        if isinstance(reward, BaseException):
            raise InputError(f"{self._name} raised {_described(reward)} {of}; mend it")
        try:
            value = float(reward)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{self._name} returned {shortened(repr(reward))} {of}; it must return a finite number")
        return value


def shortened(text: str, most: int = 60) -> str:
    """Returns a text in quotes on one line, its middle left out if it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {text[-most // 2 :]}"
    return repr(text)


def _described(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
