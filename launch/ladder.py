"""Train a family of small models, and predict the loss of a large one before it is paid for.

The config is the target. Its family are the same model at smaller width and depth; each rung is a run of constant
learning rate from which runs of several lengths branch off and decay. A law of loss over model size and tokens is
fitted to their held-out loss. It predicts the target's, and the best size and number of tokens for a budget: FLOPs, or
days or dollars on a topology. The runs are ordinary ones in FOLDER: the same command again goes on where it stopped.
"""

import argparse
from pathlib import Path

from launch.arguments import add_json, one_line, path
from launch.presets import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat ladder`."""
    flag = parser.add_argument
    flag("--rungs", metavar="N", default="5", help="number of sizes to train [5]")
    flag("--scale", metavar="X", default="10", help="the target's size over that of the largest rung [10]")
    help = "tokens a parameter of a rung's longest run, over the target's [2]"
    flag("--longest", metavar="X", default="2", help=help)
    flag(
        "--least-rows",
        metavar="N",
        default="1",
        help="rows of a step are a multiple of this, as devices divide them [1]",
    )
    help = "steps of a rung's shortest run, or more; shorter ones lie above the law of the others [400]"
    flag("--least-steps", metavar="N", default="400", help=help)
    help = "FLOPs to spend best, as in 1e19; or 30days, 5000dollars with --topology [the target's FLOPs]"
    flag("--budget", metavar="B", help=help)
    flag("--topology", type=one_line, metavar="CHIP:SHAPE", help="machine of the budget and the target, as in h100:1x8")
    flag("--price", metavar="P", help="dollars for a device-hour")
    flag("--mfu", metavar="X", help="share of its peak FLOP/s that training reaches [as `ziggurat plan` estimates]")
    flag("--to", metavar="FOLDER", type=path, help="folder of the runs [runs/ladder]", default=Path("runs/ladder"))
    flag("--dry-run", action="store_true", help="print what would be trained and how long it takes, and train nothing")
    add_json(parser)
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Trains the ladder and shows its law."""
    from launch.ladder_training import run_ladder

    return run_ladder(arguments)
