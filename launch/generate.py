"""Continue prompts with a run's model or with exported weights.

Of one --prompt, standard output is prompt + continuation alone, as it comes. Of --prompts=FILE.jsonl, whose lines are
objects with a "prompt", it is a line for each in their order: the object with "text", "tokens" (how many the text has)
and "ended" (eos, stop or length).
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError

if TYPE_CHECKING:
    from train.evaluation.continuation import Part

log = logging.getLogger("ziggurat")

BATCH_SIZE = 8
# Seconds between two lines of progress.
PROGRESS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `ziggurat generate`."""
    parser.add_argument("model", metavar="RUN|WEIGHTS", help="a run's folder, RUN@STEP, or exported weights")
    parser.add_argument("--prompt", metavar="TEXT", help="what is continued")
    parser.add_argument("--prompts", metavar="FILE", help="many, as JSONL; -: from standard input")
    parser.add_argument("--batch_size", type=int, metavar="N", help=f"so many prompts at once [{BATCH_SIZE}]")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help="end after so many tokens [64]")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw among the K most likely; 0: among all [40]")
    parser.add_argument(
        "--top_p", type=float, metavar="P", help="draw among the fewest that together have this probability [1.0]"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="divides the logits before drawing [1.0]")
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: what stands in the prompt or the text is drawn less [1.0]",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same tokens [0]")
    for axis, what in (("tensor", "heads and widths"), ("fsdp", "weights as they are stored")):
        help = f"share {what} among N devices; -1: among the rest [1]"
        parser.add_argument(f"--mesh.{axis}", dest=axis, type=int, default=1, metavar="N", help=help)


def run(arguments: argparse.Namespace) -> int:
    """Generate, writing as it goes."""
    lines = check(arguments)
    import jax

    from model.generation.sampling import GREEDY, Sampling
    from train.config.run_config import MeshConfig
    from train.devices.mesh import generation_mesh
    from train.evaluation.continuation import continuations, make_generator
    from train.weights.load import load_trained

    sampling = Sampling(
        temperature=arguments.temperature or 1.0,
        top_k=40 if arguments.top_k is None else arguments.top_k,
        top_p=arguments.top_p or 1.0,
    )
    sampling = dataclasses.replace(
        GREEDY if arguments.greedy else sampling, repetition_penalty=arguments.repetition_penalty
    )
    with jax.set_mesh(generation_mesh(MeshConfig(tensor=arguments.tensor, fsdp=arguments.fsdp))):
        trained = load_trained(arguments.model)
        tokenizer, context = trained.tokenizer, trained.config.data.segment_length
        prompts = [tokenizer.encode_with_bos(line["prompt"]) for line in lines]
        if cut := sum(len(prompt) - 1 > context for prompt in prompts):
            which = "the prompt has" if arguments.prompts is None else f"{cut} of {len(prompts)} prompts have"
            log.warning("%s more than %d tokens; the model sees the last %d", which, context, context)
        generator = make_generator(trained.config, trained.weights, tokenizer)
        # The generator has its own copy.
        del trained
        parts = continuations(
            generator,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            seed=arguments.seed or 0,
            stop=arguments.stop,
            batch_size=arguments.batch_size or BATCH_SIZE,
        )
        if arguments.prompts is not None:
            write_lines(lines, parts)
        else:
            print(arguments.prompt, end="", flush=True)
            for part in parts:
                print(part.text, end="", flush=True)
            print(end="\n" if sys.stdout.isatty() else "", flush=True)
    return 0


def write_lines(lines: list[dict[str, Any]], parts: Iterator["Part"]) -> None:
    """A line for each prompt, in their order, as soon as it and all before it are done; progress to the log."""
    texts: list[list[str]] = [[] for _ in lines]
    tokens, done, written, begun = [0] * len(lines), {}, 0, time.monotonic()
    told = begun
    for part in parts:
        texts[part.number].append(part.text)
        tokens[part.number] = part.tokens
        if part.ended:
            done[part.number] = part.ended
        while written in done:
            text = "".join(texts[written])
            result = {"text": text, "tokens": tokens[written], "ended": done[written]}
            print(json.dumps(lines[written] | result, ensure_ascii=False), flush=True)
            written += 1
        if (now := time.monotonic()) - told >= PROGRESS or len(done) == len(lines):
            told = now
            rate = sum(tokens) / (now - begun)
            log.info("%d of %d prompts, %d tokens, %.1f tokens/s", len(done), len(lines), sum(tokens), rate)


def check(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts, as objects with "prompt". InputError with everything that is wrong with flags and file."""
    problems = []
    if (arguments.prompt is None) == (arguments.prompts is None):
        problems.append("give --prompt=TEXT, or --prompts=FILE.jsonl for many")
    if arguments.batch_size is not None and arguments.prompts is None:
        problems.append("--batch_size has no effect without --prompts; leave it out")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        problems.append(f"--batch_size={arguments.batch_size} must be at least 1")
    if not 1 <= arguments.max_new_tokens < 2**31:
        problems.append(f"--max_new_tokens={arguments.max_new_tokens} must be from 1 to 2147483647")
    if "" in arguments.stop:
        problems.append("--stop is empty; give some text")
    if arguments.top_k is not None and arguments.top_k < 0:
        problems.append(f"--top_k={arguments.top_k} must be 0 or more")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        problems.append(f"--top_p={arguments.top_p} must be above 0 and at most 1")
    # Beyond these float32 has no logits left to tell tokens apart.
    if arguments.temperature is not None and not 1e-6 <= arguments.temperature <= 1e6:
        problems.append(
            f"--temperature={arguments.temperature} must be from 0.000001 to 1000000; for the most likely token use "
            "--greedy"
        )
    if not 1e-6 <= arguments.repetition_penalty <= 1e6:
        problems.append(
            f"--repetition_penalty={arguments.repetition_penalty} must be from 0.000001 to 1000000; 1 is none"
        )
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        problems.append(f"--seed={arguments.seed} must be from 0 to 2147483647")
    if arguments.greedy:
        given = [name for name in ("top_k", "top_p", "temperature", "seed") if getattr(arguments, name) is not None]
        problems += [f"--{name} has no effect with --greedy; leave one out" for name in given]
    for axis in ("tensor", "fsdp"):
        if getattr(arguments, axis) < 1 and getattr(arguments, axis) != -1:
            problems.append(f"--mesh.{axis}={getattr(arguments, axis)} must be at least 1, or -1 for the rest")
    if arguments.tensor == arguments.fsdp == -1:
        problems.append("--mesh.tensor and --mesh.fsdp are both -1; give one of them a size")
    lines: list[dict[str, Any]] = []
    if arguments.prompt is not None:
        lines.append({"prompt": arguments.prompt})
        if not is_text(arguments.prompt):
            problems.append("--prompt is not valid UTF-8")
    if arguments.prompts is not None and arguments.prompt is None:
        try:
            lines += read_prompts(arguments.prompts)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return lines


def read_prompts(file: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file, or of standard input. InputError naming each line that has no prompt."""
    if file == "-":
        name, content = "standard input", sys.stdin.buffer.read()
    else:
        try:
            name, content = file, Path(file).expanduser().read_bytes()
        except OSError as error:
            raise InputError(f"--prompts={file} cannot be read: {error.strerror}") from None
    found, problems = [], []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            # All of it is written again.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            found.append(value)
        else:
            problems.append(f'{name}:{number}: no JSON object with a text as its "prompt"')
    if problems:
        raise InputError("\n".join(problems))
    if not found:
        raise InputError(f'{name} has no prompts; give a line {{"prompt": "…"}} for each')
    return found


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
