"""The table of commands, and how a command line is read."""

import argparse
import difflib
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from data.errors import InputError

# Command → (its module, one line of help).
COMMANDS = {
    "pretrain": ("launch.pretrain", "train a model, or resume its run"),
    "tokenize": ("launch.train_tokenizer", "train a tokenizer on a corpus"),
    "evaluate": ("launch.evaluate", "loss and bits per byte on held-out documents or another corpus, and tasks"),
    "generate": ("launch.generate", "continue a prompt"),
    "chat": ("launch.chat", "talk with a model that was trained on conversations"),
    "compare": ("launch.compare", "run an experiment: variants of a config with several seeds, and which learns more"),
    "ladder": ("launch.ladder", "train a family of small models, and predict the loss of a large one"),
    "report": ("launch.report", "one HTML page of a run: what was measured, what happened; or curves of several"),
    "inspect data": ("launch.inspect_data", "which documents a step's batch is made of, or what a corpus holds"),
    "inspect loss": ("launch.inspect_loss", "what the model predicts at each position of a text"),
    "inspect attention": ("launch.inspect_attention", "one HTML page of each head's attention over a text"),
    "inspect embedding": ("launch.inspect_embedding", "which tokens' embeddings are nearest to a word's"),
    "inspect weights": (
        "launch.inspect_weights",
        "what each setting of weights means, and their logits against Transformers",
    ),
    "plan": ("launch.plan", "memory, speed, days and cost of a run, on this machine or on one that you don't have"),
    "export": ("launch.export", "write a run's weights for inference elsewhere"),
    "import": ("launch.import_weights", "make a run of weights from elsewhere"),
    "merge": ("launch.merge", "average checkpoints, as a run"),
    "launch local": ("launch.local", "run a command as several processes on this machine"),
    "launch slurm": ("launch.slurm", "pretrain on a Slurm cluster"),
    "launch kubernetes": ("launch.kubernetes", "write the manifest that pretrains on a Kubernetes cluster"),
    "presets": ("launch.list_presets", "the configs that --config names, and their sizes"),
    "doctor": ("launch.doctor", "check this machine: packages, devices, memory, disk"),
    "completion": ("launch.completion", "print a script that completes commands and flags in a shell"),
}
OVERRIDE = "--config."


class Help(argparse.RawDescriptionHelpFormatter):
    """Help whose usage line has one entry for all fields of the config."""

    def add_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None = None
    ) -> None:
        every = list(actions)
        shown = [action for action in every if not any(flag.startswith(OVERRIDE) for flag in action.option_strings)]
        if len(shown) < len(every):
            shown.append(argparse.Action([f"{OVERRIDE}GROUP.FIELD"], "overrides", metavar="VALUE"))
        super().add_usage(usage, shown, groups, prefix)


class Parser(argparse.ArgumentParser):
    """The parser of one command, whose errors are InputErrors that end with a usage line."""

    def __init__(self, command: str) -> None:
        """Loads the command's module, which adds its flags."""
        module = importlib.import_module(COMMANDS[command][0])
        super().__init__(f"ziggurat {command}", description=module.__doc__, allow_abbrev=False, formatter_class=Help)
        module.add_arguments(self)
        self.run: Callable[[argparse.Namespace], int] = module.run

    @property
    def options(self) -> list[argparse.Action]:
        """The flags, in the order of the help."""
        return [action for action in self._actions if action.option_strings]

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        raise InputError(f"{message.removeprefix('argument ')}\n  {usage}\n  all flags: {self.prog} --help")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse drops a flag's value that is "--", as if it stood alone.
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses a command's words; fields that don't exist are left to the config, which reports all its problems."""
        flags = [flag for action in self.options for flag in action.option_strings]
        for word in words[: words.index("--")] if "--" in words else words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in flags and not name.startswith(OVERRIDE):
                from train.config.values import nearest

                self.error(f"{word}: there is no such flag{nearest(name, flags)}")
        arguments, unknown = self.parse_known_args(words)
        for word in unknown:
            name, has_value, value = word.partition("=")
            if not (hasattr(arguments, "overrides") and name.startswith(OVERRIDE) and has_value):
                self.error(f"{word}: there is no such flag")
            arguments.overrides[name.removeprefix(OVERRIDE)] = value
        return arguments


def parse(argv: Sequence[str]) -> tuple[Callable[[argparse.Namespace], int], argparse.Namespace]:
    """Returns the function that runs the command, and its arguments. Raises InputError where there is none."""
    command = " ".join(argv[:2]) if " ".join(argv[:2]) in COMMANDS else " ".join(argv[:1])
    if command not in COMMANDS:
        by_last_word = {name.split()[-1]: name for name in COMMANDS} | {name: name for name in COMMANDS}
        typed = " ".join(argv[:2]) if overview(argv[:1]) else argv[0]
        nearest = difflib.get_close_matches(typed, by_last_word, n=1)
        remedy = f"; did you mean {by_last_word[nearest[0]]}?" if nearest else ""
        usage = "  usage: ziggurat COMMAND ...; all commands: ziggurat --help"
        raise InputError(f"{typed}: there is no such command{remedy}\n{usage}")
    parser = Parser(command)
    return parser.run, parser.read(argv[len(command.split()) :])


def overview(words: Sequence[str]) -> str:
    """Returns a table of the commands that begin with these words; empty where there are none."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        f"  {name:{width}}  {help}"
        for name, (_, help) in COMMANDS.items()
        if name.split()[: len(words)] == list(words) and name != " ".join(words)
    )
