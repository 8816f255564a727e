"""Make a run of weights from elsewhere, with their tokenizer: to evaluate, to generate, to pretrain further.

Reads a folder of Hugging Face Transformers in safetensors of any float dtype: GPT-1, GPT-2, GPT-NeoX, Llama, Mistral,
Ministral, Mixtral, Qwen2 and 3, with experts, too, Gemma 1 to 3, Phi-3, OLMo 2 and 3, OLMoE, SmolLM3, Granite, GLM-4
and 4.5, StableLM, StarCoder 2, Cohere 2, DeepSeek-V2 and V3, Kimi K2, and gpt-oss. The run holds the weights as its
checkpoint of step 0, from which another run can start:

  ziggurat pretrain --config=RUN@0 --config.train.run_dir=FOLDER --config.data.corpus=PATH

With --experts the run is a mixture of experts that begins with the loss of the dense model (upcycling).
"""

import argparse

from data.errors import InputError
from launch.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat import`."""
    parser.add_argument("weights", type=path, metavar="WEIGHTS", help="a folder of weights")
    parser.add_argument("--to", required=True, type=path, metavar="RUN", help="a new folder for the run")
    help = "begin a mixture with N copies of each feed-forward and a router of its own, which computes the same"
    parser.add_argument("--experts", metavar="N", help=help)
    parser.add_argument("--experts-per-token", metavar="K", help="copies that compute a token [2]")


def run(arguments: argparse.Namespace) -> int:
    """Imports the weights and prints the run's folder."""
    import jax

    # Weights are read and written in the host's memory, which may be larger than an accelerator's.
    jax.config.update("jax_platforms", "cpu")
    from train.weights.import_run import import_weights

    experts, per_token = None, arguments.experts_per_token
    if arguments.experts is not None:
        experts = number("--experts", arguments.experts), number("--experts-per-token", per_token or "2")
    elif per_token is not None:
        raise InputError(f"--experts-per-token={per_token} goes with --experts=N")
    import_weights(arguments.weights, arguments.to, experts)
    print(arguments.to)
    return 0


def number(flag: str, text: str) -> int:
    """Returns a flag's whole number; raises InputError where it is none, or not above 0."""
    if not text.isdecimal() or not 0 < int(text) <= 2**14:
        raise InputError(f"{flag}={text}: give a whole number from 1 to {2**14}, as in {flag}=8")
    return int(text)
