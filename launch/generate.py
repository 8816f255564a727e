"""Continue prompts with a run's model or with exported weights.

With one --prompt, standard output is the prompt and its continuation alone, printed as it is generated. With --suffix,
too, a model that was trained to fill in the middle writes what is between the two, and the suffix is printed last. With
--prompts=FILE.jsonl, whose lines are objects with a "prompt", it is a line for each prompt in their order: the object
with "text", "tokens" (their number in the text) and "ended" (eos, stop or length).
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.files.json_file import LARGEST_FILE
from launch.arguments import add_model, one_line, text, too_small

if TYPE_CHECKING:
    from train.evaluation.continuation import ContinuationPart

log = logging.getLogger("ziggurat")

BATCH_SIZE = 8
SECONDS_BETWEEN_PROGRESS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat generate`."""
    add_model(parser)
    parser.add_argument("--prompt", type=text, metavar="TEXT", help="the text to continue")
    help = "the text after a middle that the model fills in, with --prompt before it"
    parser.add_argument("--suffix", type=text, metavar="TEXT", help=help)
    parser.add_argument(
        "--prompts", type=one_line, metavar="FILE", help="many prompts, as JSONL; - reads standard input"
    )
    parser.add_argument("--batch_size", type=int, metavar="N", help=f"prompts to continue at once [{BATCH_SIZE}]")
    help = "tokens after which a continuation ends [64]"
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N", help=help)
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


def run(arguments: argparse.Namespace) -> int:
    """Prints continuations as they are generated."""
    lines = check(arguments)
    import jax

    from model.generation.sampling import GREEDY, Sampling
    from train.config.run_config import MeshConfig
    from train.devices.mesh import generation_mesh
    from train.evaluation.continuation import continuations, make_generator
    from train.weights.load import load_trained

    top_k = 40 if arguments.top_k is None else arguments.top_k
    drawn = Sampling(temperature=arguments.temperature or 1.0, top_k=top_k, top_p=arguments.top_p or 1.0)
    sampling = GREEDY if arguments.greedy else drawn
    middle = None if arguments.suffix is None else ids_before_middle(arguments)
    mesh = generation_mesh(MeshConfig(tensor=arguments.tensor, fsdp=arguments.fsdp))
    if arguments.int8 and (mesh.size > 1 or mesh.devices.flat[0].platform != "cpu"):
        raise InputError("--int8 is for one CPU; leave it out on other devices and with --mesh.tensor or --mesh.fsdp")
    with jax.set_mesh(mesh):
        trained = load_trained(arguments.model)
        tokenizer = trained.tokenizer
        context = trained.config.data.segment_length
        prompts = [middle] if middle else [tokenizer.encode_with_bos(line["prompt"]) for line in lines]
        if too_long := sum(len(prompt) - 1 > context for prompt in prompts):
            which = "the prompt has" if arguments.prompts is None else f"{too_long} of {len(prompts)} prompts have"
            log.warning("%s more than %d tokens; the model sees the last %d", which, context, context)
        generator = make_generator(trained.config, trained.weights, tokenizer, int8=arguments.int8)
        # Frees these weights: the generator has its own copy.
        del trained
        parts = continuations(
            generator,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            sampling=dataclasses.replace(sampling, repetition_penalty=arguments.repetition_penalty),
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
            print(arguments.suffix or "", end="")
            print(end="\n" if sys.stdout.isatty() else "", flush=True)
    return 0


def ids_before_middle(arguments: argparse.Namespace) -> list[int]:
    """Returns the prompt of a middle, before any weights are read.

    The order is PSM, which all models that fill in the middle know, but for a run that was trained with SPM alone.
    InputError if the model has no marks for it, or its context no room.
    """
    from data.infilling import middle_prompt
    from train.weights.load import open_weights, run_of

    opened, run = open_weights(arguments.model), run_of(arguments.model)
    spm = run is not None and run.load_config().data.fim_spm_rate == 1
    try:
        ids = middle_prompt(opened.tokenizer, arguments.prompt, arguments.suffix, spm)
    except InputError as error:
        raise InputError(f"--suffix: {error}") from None
    if len(ids) + arguments.max_new_tokens > opened.context:
        # A continuation goes on from the newer half of a full context, where the marks are no more.
        raise InputError(
            f"--suffix: the texts around the middle have {len(ids)} tokens with their marks, and --max_new_tokens is "
            f"{arguments.max_new_tokens}, but the model sees {opened.context}; give shorter texts or fewer new tokens"
        )
    return ids


def write_lines(lines: list[dict[str, Any]], parts: Iterator["ContinuationPart"]) -> None:
    """Prints a line for each prompt, in their order, once it and all before it are done; logs the progress."""
    texts = [""] * len(lines)
    tokens = [0] * len(lines)
    endings: dict[int, str] = {}
    written = 0
    start = last_progress = time.monotonic()
    for part in parts:
        texts[part.number] += part.text
        tokens[part.number] = part.tokens
        if part.ended:
            endings[part.number] = part.ended
        while written in endings:
            result = {"text": texts[written], "tokens": tokens[written], "ended": endings[written]}
            print(json.dumps(lines[written] | result, ensure_ascii=False), flush=True)
            written += 1
        now = time.monotonic()
        if now - last_progress >= SECONDS_BETWEEN_PROGRESS or len(endings) == len(lines):
            last_progress = now
            rate = sum(tokens) / (now - start)
            log.info("%d of %d prompts, %d tokens, %.1f tokens/s", len(endings), len(lines), sum(tokens), rate)


def check(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the prompts as objects with "prompt". Raises InputError with everything wrong with flags and file."""
    problems = flag_problems(arguments)
    lines: list[dict[str, Any]] = [{"prompt": arguments.prompt}]
    if (arguments.prompt is None) == (arguments.prompts is None):
        problems.insert(0, "give --prompt=TEXT, or --prompts=FILE.jsonl for many")
    elif arguments.prompts is not None:
        try:
            lines = read_prompts(arguments.prompts)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return lines


def flag_problems(arguments: argparse.Namespace) -> list[str]:
    """Returns what is wrong with the flags besides the prompts."""
    problems = too_small(arguments, {"batch_size": 1, "top_k": 0})
    if arguments.suffix is not None and arguments.prompt is None:
        problems.append("--suffix is what comes after --prompt; give both, and an empty --prompt= for no text before")
    if arguments.batch_size is not None and arguments.prompts is None:
        problems.append("--batch_size has no effect without --prompts; leave it out")
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


def read_prompts(file: str) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file or of standard input. Raises InputError naming lines without a prompt."""
    name = "standard input" if file == "-" else file
    try:
        # A pipe or a device may have no end.
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"--prompts={file} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"--prompts={file} has more than {LARGEST_FILE:,} bytes; give the prompts in parts")
    prompts: list[dict[str, Any]] = []
    problems = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            # The whole object is printed again, so all of its texts must be valid UTF-8.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and isinstance(value.get("prompt"), str):
            prompts.append(value)
        else:
            problems.append(f'{name}:{number}: no JSON object with a text as its "prompt"')
    if problems:
        raise InputError("\n".join(problems))
    if not prompts:
        raise InputError(f'{name} has no prompts; give a line {{"prompt": "…"}} for each')
    return prompts
