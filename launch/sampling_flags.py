"""Flags of the commands that generate text: how tokens are drawn, when a text ends, and which devices share a model."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from data.errors import InputError
from launch.arguments import too_small

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from model.generation.sampling import Sampling


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the flags, with this default of --max_new_tokens."""
    help = f"tokens after which a text ends [{max_new_tokens}]"
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens, metavar="N", help=help)
    help = "end before this text; may be given several times"
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help=help)
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw among the K most likely; 0: among all [40]")
    help = "draw among the fewest that together have this probability [1.0]"
    parser.add_argument("--top_p", type=float, metavar="P", help=help)
    parser.add_argument("--temperature", type=float, metavar="X", help="divides the logits before drawing [1.0]")
    help = "above 1: tokens of the prompt and of the text so far become less likely [1.0]"
    parser.add_argument("--repetition_penalty", type=float, default=1.0, metavar="X", help=help)
    parser.add_argument("--int8", action="store_true", help="multiply in 8 bits: faster on a CPU, a little less exact")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens [0]")
    for axis, shared in (("tensor", "heads and widths"), ("fsdp", "weights as they are stored")):
        help = f"share {shared} among N devices; -1: among the rest [1]"
        parser.add_argument(f"--mesh.{axis}", dest=axis, type=int, default=1, metavar="N", help=help)


def sampling_problems(arguments: argparse.Namespace) -> list[str]:
    """Returns what is wrong with the flags."""
    problems = too_small(arguments, {"top_k": 0})
    if not 1 <= arguments.max_new_tokens < 2**31:
        problems.append(f"--max_new_tokens={arguments.max_new_tokens} must be from 1 to 2147483647")
    if "" in arguments.stop:
        problems.append("--stop is empty; give some text")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        problems.append(f"--top_p={arguments.top_p} must be above 0 and at most 1")
    # Outside these bounds float32 logits no longer tell tokens apart.
    bounds = "must be from 0.000001 to 1000000"
    temperature, penalty = arguments.temperature, arguments.repetition_penalty
    if temperature is not None and not 1e-6 <= temperature <= 1e6:
        problems.append(f"--temperature={temperature} {bounds}; for the most likely token use --greedy")
    if not 1e-6 <= penalty <= 1e6:
        problems.append(f"--repetition_penalty={penalty} {bounds}; 1 is none")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2147483647")
    if arguments.greedy:
        unused = [name for name in ("top_k", "top_p", "temperature", "seed") if getattr(arguments, name) is not None]
        problems += [f"--{name} has no effect with --greedy; leave one out" for name in unused]
    for axis, size in (("tensor", arguments.tensor), ("fsdp", arguments.fsdp)):
        if size < 1 and size != -1:
            problems.append(f"--mesh.{axis}={size} must be at least 1, or -1 for the rest")
    if arguments.tensor == arguments.fsdp == -1:
        problems.append("--mesh.tensor and --mesh.fsdp are both -1; give one of them a size")
    return problems


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    """Returns how tokens are drawn."""
    from model.generation.sampling import GREEDY, Sampling

    top_k = 40 if arguments.top_k is None else arguments.top_k
    drawn = Sampling(temperature=arguments.temperature or 1.0, top_k=top_k, top_p=arguments.top_p or 1.0)
    sampling = GREEDY if arguments.greedy else drawn
    return dataclasses.replace(sampling, repetition_penalty=arguments.repetition_penalty)


def mesh_of(arguments: argparse.Namespace) -> "Mesh":
    """Returns the mesh of the devices that share the model. InputError if there are too few, or --int8 has another."""
    from train.config.run_config import MeshConfig
    from train.devices.mesh import generation_mesh

    mesh = generation_mesh(MeshConfig(tensor=arguments.tensor, fsdp=arguments.fsdp))
    if arguments.int8 and (mesh.size > 1 or mesh.devices.flat[0].platform != "cpu"):
        raise InputError("--int8 is for one CPU; leave it out on other devices and with --mesh.tensor or --mesh.fsdp")
    return mesh
