"""One HTML page of who attends to whom: every layer's and head's attention over a prompt. It loads nothing."""

import argparse
from pathlib import Path

from data.errors import InputError
from launch.report import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat inspect attention`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text, one segment at most")
    parser.add_argument(
        "--to", metavar="FILE.html", type=Path, default=Path("attention.html"), help="the page [attention.html]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page; its path goes to standard output."""
    try:
        if not arguments.prompt.encode():
            raise InputError("--prompt is empty; give some text")
    except UnicodeEncodeError:
        raise InputError("--prompt is not valid UTF-8") from None
    from launch.page.attention_page import GENERATOR, make_attention_page, most_tokens

    output = arguments.to.expanduser()
    check_output(output, "--to", GENERATOR, "page of attention")
    import jax

    from train.devices.mesh import on_one_device
    from train.evaluation.inspection import attention_of, token_text
    from train.run.storage import write_atomically
    from train.weights.load import load_trained

    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        config = trained.config
        tokens = trained.tokenizer.encode_with_bos(arguments.prompt)
        most = min(config.data.segment_length, most_tokens(config.model.num_layers, config.model.num_heads))
        if len(tokens) > most:
            raise InputError(
                f"--prompt has {len(tokens) - 1} tokens; the model sees {config.data.segment_length} at once, of which "
                f"one stands before a text, and of its {config.model.num_layers} × {config.model.num_heads} heads a "
                f"page shows {most}; give {most - 1} at most"
            )
        weights_LHTT = attention_of(config, trained.weights, tokens)
    texts = [token_text(trained.tokenizer, token) for token in tokens]
    write_atomically(output, make_attention_page(arguments.model, texts, weights_LHTT))
    print(output)
    return 0
