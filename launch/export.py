"""Write weights and their tokenizer for inference elsewhere, a layer at a time."""

import argparse
import os
from pathlib import Path

from data.errors import InputError

# Format → what --dtype can be, the first by default.
DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": ("f32", "f16", "bf16", "q8_0")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat export`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or a folder of weights")
    parser.add_argument(
        "--format",
        required=True,
        choices=list(DTYPES),
        help="hf: a folder that Hugging Face Transformers opens; gguf: a file for llama.cpp",
    )
    parser.add_argument(
        "--to",
        required=True,
        type=os.path.expanduser,
        metavar="DIR|FILE",
        help="the folder, or the file; an earlier export is replaced",
    )
    told = "; ".join(f"{format}: {', '.join(dtypes)}" for format, dtypes in DTYPES.items())
    parser.add_argument("--dtype", metavar="NAME", help=f"of the weights; {told} [the first]")


def run(arguments: argparse.Namespace) -> int:
    """Export; the folder or file goes to standard output."""
    dtypes, to = DTYPES[arguments.format], Path(arguments.to)
    dtype = arguments.dtype or dtypes[0]
    if dtype not in dtypes:
        raise InputError(f"--dtype={dtype}: with --format={arguments.format} it is one of {', '.join(dtypes)}")
    import jax

    # All is read and written in the host's memory, however large an accelerator's is.
    jax.config.update("jax_platforms", "cpu")
    from train.weights.gguf import check_gguf_file, write_gguf
    from train.weights.huggingface import check_export_folder, check_expressible, write_huggingface
    from train.weights.load import open_weights, run_of
    from train.weights.model_card import model_card

    check = check_export_folder if arguments.format == "hf" else check_gguf_file
    check(to)
    weights = open_weights(arguments.model)
    if arguments.format == "hf":
        check_expressible(weights.config)
        write_huggingface(to, weights, dtype, model_card(weights, run_of(arguments.model)))
    else:
        write_gguf(to, weights.config, weights.context, weights.read, weights.tokenizer, dtype)
    print(arguments.to)
    return 0
