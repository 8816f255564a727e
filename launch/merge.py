"""Average checkpoints of one run, or of several that began from the same weights, as a new run.

Its settings are those of the first checkpoint's run. It is evaluated, exported and generated from like any run; to
train it further, let another run start from it:

  ziggurat pretrain --config=RUN@0 --config.train.run_dir=FOLDER

--decay is for the last checkpoints of a run whose learning rate was constant: their average is about what the run would
have been, had its rate decayed linearly to 0 from the first of them to the last.
"""

import argparse
import logging

from data.errors import InputError
from launch.arguments import one_line, path

log = logging.getLogger("ziggurat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat merge`."""
    help = "checkpoints, each RUN@STEP, or a run's folder for its newest"
    parser.add_argument("checkpoints", type=one_line, nargs="+", metavar="RUN@STEP", help=help)
    parser.add_argument("--to", required=True, type=path, metavar="RUN", help="a new folder for the run")
    how = parser.add_mutually_exclusive_group()
    help = "a number for each checkpoint, as in 1,2,1; their shares count [equal ones]"
    how.add_argument("--weights", metavar="W,W,...", help=help)
    help = "weights with which the average equals a linear decay of the learning rate to 0 over these checkpoints"
    how.add_argument("--decay", action="store_true", help=help)


def run(arguments: argparse.Namespace) -> int:
    """Writes the run and prints its folder."""
    weights = None if arguments.weights is None else numbers(arguments.weights)
    import jax

    # Weights are read and written in the host's memory, which may be larger than an accelerator's.
    jax.config.update("jax_platforms", "cpu")
    from train.weights.merge import merge

    for warning in merge(arguments.checkpoints, arguments.to, weights, arguments.decay):
        log.warning(warning)
    print(arguments.to)
    return 0


def numbers(text: str) -> list[float]:
    """Returns the numbers of a text with commas between; raises InputError where one is none."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"--weights={text}: give numbers with commas between, as in --weights=1,2,1") from None
