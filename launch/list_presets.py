"""List the presets that `--config` names, with the number of parameters of each model."""

import argparse
import ast

from launch.columns import columns
from launch.presets import PRESETS, load_config, presets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: `ziggurat presets` has no flags."""


def run(arguments: argparse.Namespace) -> int:
    """Prints a table of the presets, the smallest model first."""
    from model.parameters import count_parameters

    rows = []
    for name in presets():
        config = load_config(name, {})
        model = config.resolved(config.tokenizer.vocab_size).model
        docstring = ast.get_docstring(ast.parse((PRESETS / f"{name}.py").read_text())) or ""
        # The description follows the command and ends with the first colon.
        description = docstring.partition("\n\n")[2].partition(":")[0]
        rows.append((count_parameters(model), name, " ".join(description.split())))
    table = [(name, f"{count:,}", text) for count, name, text in sorted(rows)]
    print(columns([("preset", "parameters", "description"), *table], right={1}))
    print(f"\ntheir files: {PRESETS}/NAME.py; start one with: ziggurat pretrain --config=NAME")
    return 0
