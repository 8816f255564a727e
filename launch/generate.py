"""Continue prompts with a run's model or with exported weights.

With one --prompt, standard output is the prompt and its continuation alone, printed as it is generated. With --suffix,
too, a model that was trained to fill in the middle writes what is between the two, and the suffix is printed last. With
--prompts=FILE.jsonl, whose lines are objects with a "prompt", or with the "messages" of a conversation to be answered,
it is a line for each in their order: the object with "text", "tokens" (their number in the text) and "ended" (eos, stop
or length).
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from data.errors import BadText, InputError
from data.files.json_file import LARGEST_FILE
from launch.arguments import add_model, one_line, text, too_small
from launch.sampling_flags import add_sampling, mesh_of, sampling_of, sampling_problems

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
    add_sampling(parser, max_new_tokens=64)


def run(arguments: argparse.Namespace) -> int:
    """Prints continuations as they are generated."""
    places = check(arguments)
    lines = [*places.values()]
    import jax

    from train.evaluation.continuation import continuations, make_generator
    from train.weights.load import load_trained

    middle = None if arguments.suffix is None else ids_before_middle(arguments)
    conversations, end_ids = ids_before_answers(arguments.model, places)
    with jax.set_mesh(mesh_of(arguments)):
        trained = load_trained(arguments.model)
        tokenizer = trained.tokenizer
        context = trained.config.data.segment_length
        ids = lambda place, line: conversations.get(place) or tokenizer.encode_with_bos(line["prompt"])
        prompts = [middle] if middle else [ids(place, line) for place, line in places.items()]
        if too_long := sum(len(prompt) - 1 > context for prompt in prompts):
            which = "the prompt has" if arguments.prompts is None else f"{too_long} of {len(prompts)} prompts have"
            log.warning("%s more than %d tokens; the model sees the last %d", which, context, context)
        generator = make_generator(trained.config, trained.weights, tokenizer, arguments.int8, end_ids)
        # Frees these weights: the generator has its own copy.
        del trained
        parts = continuations(
            generator,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling_of(arguments),
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


def ids_before_answers(model: str, lines: Mapping[str, dict[str, Any]]) -> tuple[dict[str, list[int]], list[int]]:
    """Returns the prompts of the lines with "messages" by place, and the tokens that end answers.

    InputError, before any weights are read, if the model has no chat template, or lines cannot be answered.
    """
    chats = {place: line["messages"] for place, line in lines.items() if "messages" in line}
    if not chats:
        return {}, []
    from data.chat import Prompts
    from train.weights.load import open_weights

    opened = open_weights(model)
    prompts = Prompts(opened.tokenizer)
    ids: dict[str, list[int]] = {}
    problems = []
    for place, messages in chats.items():
        try:
            ids[place] = prompts.ids(messages)
        except BadText as error:
            problems.append(f"{place}: {error}")
            continue
        if len(ids[place]) > opened.context:
            problems.append(f"{place}: {len(ids[place])} tokens, but the model sees {opened.context}; shorten it")
    if problems:
        raise InputError("\n".join(problems))
    return ids, prompts.end_ids


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


def check(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the prompts as objects, by place. Raises InputError with everything wrong with flags and file."""
    problems = flag_problems(arguments)
    lines: dict[str, dict[str, Any]] = {"--prompt": {"prompt": arguments.prompt}}
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
    problems = too_small(arguments, {"batch_size": 1}) + sampling_problems(arguments)
    if arguments.suffix is not None and arguments.prompt is None:
        problems.append("--suffix is what comes after --prompt; give both, and an empty --prompt= for no text before")
    if arguments.batch_size is not None and arguments.prompts is None:
        problems.append("--batch_size has no effect without --prompts; leave it out")
    return problems


def read_prompts(file: str) -> dict[str, dict[str, Any]]:
    """Returns the objects of a JSONL file or of standard input by place, such as "a.jsonl:3".

    Raises InputError naming lines that have not one of a prompt and messages.
    """
    name = "standard input" if file == "-" else file
    try:
        # A pipe or a device may have no end.
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"--prompts={file} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"--prompts={file} has more than {LARGEST_FILE:,} bytes; give the prompts in parts")
    prompts: dict[str, dict[str, Any]] = {}
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
        is_object = isinstance(value, dict) and ("prompt" in value) != ("messages" in value)
        if is_object and isinstance(value.get("prompt", value.get("messages")), str if "prompt" in value else list):
            prompts[f"{name}:{number}"] = value
        else:
            problems.append(f'{name}:{number}: no JSON object with a text as its "prompt", or a list as its "messages"')
    if problems:
        raise InputError("\n".join(problems))
    if not prompts:
        raise InputError(f'{name} has no prompts; give a line {{"prompt": "…"}} for each')
    return prompts
