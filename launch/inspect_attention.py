"""Write one HTML page of every layer's and head's attention over a prompt. The page is complete in one file."""

import argparse
from pathlib import Path

from data.errors import InputError
from launch.arguments import add_model, check_output, path, prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat inspect attention`."""
    add_model(parser)
    parser.add_argument("--prompt", type=prompt, required=True, metavar="TEXT", help="the text, one segment at most")
    page = Path("attention.html")
    parser.add_argument("--to", metavar="FILE.html", type=path, default=page, help=f"the page [{page}]")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and prints its path."""
    from launch.page.attention_page import GENERATOR, make_attention_page, max_tokens

    check_output(arguments.to, "--to", GENERATOR, "page of attention")
    import jax

    from data.files.atomic import atomic_file
    from train.devices.mesh import one_device_mesh
    from train.evaluation.inspection import attention_maps, token_text
    from train.weights.load import load_trained

    with jax.set_mesh(one_device_mesh()):
        trained = load_trained(arguments.model, predicts=False)
        config = trained.config
        tokens = trained.tokenizer.encode_with_bos(arguments.prompt)
        most = min(config.data.segment_length, max_tokens(config.model.num_layers, config.model.num_heads))
        if len(tokens) > most:
            before = len(trained.tokenizer.bos_ids)
            raise InputError(
                f"--prompt has {len(tokens) - before} tokens; the model sees {config.data.segment_length} at once, "
                f"with the {before} before every text, and of its {config.model.num_layers} × "
                f"{config.model.num_heads} heads a page shows {most}; give {most - before} at most"
            )
        weights_LHTT = attention_maps(config, trained.weights, tokens)
    texts = [token_text(trained.tokenizer, token) for token in tokens]
    page = make_attention_page(arguments.model, texts, weights_LHTT)
    with atomic_file(arguments.to) as partial:
        partial.write_text(page)
    print(arguments.to)
    return 0
