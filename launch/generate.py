"""Continue a prompt with a run's model or with exported weights. Standard output is prompt + continuation alone."""

import argparse
import codecs
import dataclasses
import logging
import sys

from data.errors import InputError

log = logging.getLogger("ziggurat")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat generate`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is continued")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="end after so many tokens [64]")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw among the K most likely; 0: among all [40]")
    parser.add_argument("--temperature", type=float, metavar="X", help="divides the logits before drawing [1.0]")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens [0]")


def run(arguments: argparse.Namespace) -> int:
    """Generate, writing as it goes."""
    check(arguments)
    import jax

    from model.generate import generate
    from train.mesh import GENERATION, on_one_device
    from train.run import load_trained

    with jax.set_mesh(on_one_device()):
        trained = load_trained(arguments.model)
        context = trained.config.data.segment_length
        prompt = trained.tokenizer.encode(arguments.prompt).tolist()
        if len(prompt) > context:
            log.warning("the prompt has %d tokens; the model sees the last %d", len(prompt), context)
        tokens = generate(
            # What the tokenizer has no text for is not drawn.
            dataclasses.replace(trained.config.model, vocab_size=trained.tokenizer.vocab_size),
            trained.weights,
            prompt,
            context=context,
            eos_id=trained.tokenizer.eos_id,
            max_new_tokens=arguments.max_new_tokens,
            top_k=40 if arguments.top_k is None else arguments.top_k,
            temperature=0.0 if arguments.greedy else arguments.temperature or 1.0,
            seed=arguments.seed or 0,
            layout=GENERATION,
        )
        print(arguments.prompt, end="", flush=True)
        # A character may be several tokens: its bytes wait until they are all there.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            print(decoder.decode(trained.tokenizer.token_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True), end="\n" if sys.stdout.isatty() else "", flush=True)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """InputError with everything that is wrong with the flags."""
    problems = []
    if arguments.max_new_tokens < 1:
        problems.append(f"--max_new_tokens={arguments.max_new_tokens} must be at least 1")
    if arguments.top_k is not None and arguments.top_k < 0:
        problems.append(f"--top_k={arguments.top_k} must be 0 or more")
    if arguments.temperature is not None and not 0 < arguments.temperature < float("inf"):
        problems.append(
            f"--temperature={arguments.temperature} must be above 0; for the most likely token use --greedy"
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2147483647")
    if arguments.greedy:
        given = [name for name in ("top_k", "temperature", "seed") if getattr(arguments, name) is not None]
        problems += [f"--{name} has no effect with --greedy; leave one out" for name in given]
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        problems.append("--prompt is not valid UTF-8")
    if problems:
        raise InputError("\n".join(problems))
