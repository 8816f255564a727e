"""Write weights and their tokenizer for inference elsewhere, one layer at a time."""

import argparse

from data.errors import InputError
from launch.arguments import add_model, path

# Format → the choices of --dtype, the default first.
DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": ("f32", "f16", "bf16", "q8_0")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat export`."""
    add_model(parser)
    help = "hf: a folder that Hugging Face Transformers opens; gguf: a file for llama.cpp"
    parser.add_argument("--format", required=True, choices=list(DTYPES), help=help)
    help = "the folder, or the file; an earlier export is replaced"
    parser.add_argument("--to", required=True, type=path, metavar="DIR|FILE", help=help)
    choices = "; ".join(f"{format}: {', '.join(dtypes)}" for format, dtypes in DTYPES.items())
    parser.add_argument("--dtype", metavar="NAME", help=f"data type of the weights; {choices} [the first]")


def run(arguments: argparse.Namespace) -> int:
    """Exports the weights and prints the path of the folder or file."""
    dtypes = DTYPES[arguments.format]
    dtype = arguments.dtype or dtypes[0]
    if dtype not in dtypes:
        raise InputError(f"--dtype={dtype}: with --format={arguments.format} it is one of {', '.join(dtypes)}")
    import jax

    # Weights are read and written in the host's memory, which may be larger than an accelerator's.
    jax.config.update("jax_platforms", "cpu")
    from train.weights.gguf import check_gguf_file, write_gguf
    from train.weights.huggingface import check_export_folder, check_expressible, write_huggingface
    from train.weights.load import open_weights, run_of
    from train.weights.model_card import model_card

    if arguments.format == "hf":
        check_export_folder(arguments.to)
        weights = open_weights(arguments.model)
        check_expressible(weights.config)
        write_huggingface(arguments.to, weights, dtype, model_card(weights, run_of(arguments.model)))
    else:
        check_gguf_file(arguments.to)
        weights = open_weights(arguments.model)
        write_gguf(arguments.to, weights, dtype)
    print(arguments.to)
    return 0
