"""Talk with a model that was trained on conversations.

Each line is a question, and a backslash at its end continues it in the next. The answer is printed as it is generated.
Ctrl-C ends the answer, Ctrl-D the chat. /help lists commands: the last answer once more, saving, beginning again. From
a pipe, standard output is the answers alone, and the first line that is refused ends the chat.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import InputError
from data.printable import printable
from launch.arguments import add_model, one_line, text
from launch.sampling_flags import add_sampling, mesh_of, sampling_of, sampling_problems
from launch.streams import DIM, PLAIN, interrupt_handled, is_colored

if TYPE_CHECKING:
    from data.chat import Chat
    from train.evaluation.continuation import ContinuationPart

COMMANDS = {
    "/regenerate": "answer the last question once more, with other draws",
    "/save FILE": "append the conversation to a .jsonl file, as a line that data.messages_field=messages reads",
    "/clear": "begin again, without the turns so far",
    "/help": "list the commands",
    "/quit": "leave, as Ctrl-D does",
}
MAX_NEW_TOKENS = 512
# Earlier turns leave this share of the context to the answer, or less where --max_new_tokens is less.
ROOM = 1 / 4
LONGEST_LINE = 2**20
# Makes the parts of an answer from the ids of its prompt and a seed.
Answerer = Callable[[Sequence[int], int], Iterator["ContinuationPart"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `ziggurat chat`."""
    add_model(parser)
    parser.add_argument("--system", type=text, metavar="TEXT", help="the turn of the system, which begins the chat")
    help = "the Jinja file that writes a conversation as text [the model's own]"
    parser.add_argument("--template", type=one_line, metavar="FILE", help=help)
    add_sampling(parser, max_new_tokens=MAX_NEW_TOKENS)


def run(arguments: argparse.Namespace) -> int:
    """Answers the questions of standard input."""
    check(arguments)
    import jax

    from data.chat import Chat, Prompts
    from train.evaluation.continuation import continuations, make_generator
    from train.weights.load import check_predicts, load_trained, open_weights

    # What is wrong with template and system is found before weights are read.
    opened = open_weights(arguments.model)
    check_predicts(opened.config, arguments.model)
    prompts = Prompts(opened.tokenizer, arguments.template)
    chat = Chat(prompts, opened.context, min(arguments.max_new_tokens, int(opened.context * ROOM)), arguments.system)
    with jax.set_mesh(mesh_of(arguments)):
        trained = load_trained(arguments.model)
        tokenizer, context = trained.tokenizer, opened.context
        generator = make_generator(trained.config, trained.weights, tokenizer, arguments.int8, prompts.end_ids)
        # Frees these weights: the generator has its own copy.
        del trained

        def answer(ids: Sequence[int], seed: int) -> Iterator["ContinuationPart"]:
            return continuations(
                generator,
                tokenizer,
                [ids],
                # Beyond the context the model would see the question no more.
                max_new_tokens=min(arguments.max_new_tokens, context - len(ids)),
                sampling=sampling_of(arguments),
                seed=seed,
                stop=[*arguments.stop, *prompts.marks],
            )

        is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        Session(chat, answer, arguments.seed or 0, arguments.greedy, is_terminal).run()
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises InputError with everything that is wrong with the flags."""
    problems = sampling_problems(arguments)
    if arguments.template is not None and not os.path.isfile(arguments.template):
        problems.append(f"--template={arguments.template}: there is no such file; name a Jinja file")
    if problems:
        raise InputError("\n".join(problems))


class Session:
    """A chat on a terminal, or with a pipe.

    Args:
        chat: the conversation, at its beginning.
        answer: the model, as a function of a prompt and a seed.
        seed: the seed of --seed, from which each answer has its own.
        is_greedy: True where an answer does not depend on the seed.
        is_terminal: True where a person types the questions, who is asked for them and may mend what is refused.
    """

    def __init__(self, chat: "Chat", answer: Answerer, seed: int, is_greedy: bool, is_terminal: bool):
        self._chat, self._answer, self._seed = chat, answer, seed
        self._is_greedy, self._is_terminal = is_greedy, is_terminal

    def run(self) -> None:
        """Answers until the input ends. InputError at a line that is refused, unless a person can mend it."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are not UTF-8 are refused with the question that holds them.
            sys.stdin.reconfigure(errors="surrogateescape")
        if self._is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  gives `input` its editing and history
            note("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the chat")
        while (line := self._read()) is not None and line.strip() != "/quit":
            try:
                self._obey(line)
            except InputError as error:
                if not self._is_terminal:
                    raise
                note(str(error))
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                interrupt_handled()
                print(flush=True)

    def _read(self) -> str | None:
        """Returns the next line, with those that continue it; None at the end."""
        lines: list[str] = []
        while True:
            try:
                line = input("  " if lines else "> ") if self._is_terminal else piped_line()
            except EOFError:
                if self._is_terminal:
                    print()
                return "\n".join(lines) or None
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                # As in a shell, the line that was being typed is dropped.
                interrupt_handled()
                print()
                lines = []
                continue
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _obey(self, line: str) -> None:
        """Does what a line asks for; a question with a slash at its beginning has a space before it."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        if not line.startswith("/"):
            self._write(lambda: self._chat.ask(valid(line.strip())))
        elif word == "/save" and rest:
            note(save(rest.strip(), self._chat.messages()))
        elif line.strip() == "/regenerate":
            if self._is_greedy:
                raise InputError("/regenerate has no effect with --greedy, which answers alike each time")
            self._write(self._chat.ask_again)
        elif line.strip() == "/clear":
            self._chat.clear()
            note("a new conversation")
        elif line.strip() == "/help":
            note("\n".join(f"{command:12} {help}" for command, help in COMMANDS.items()))
        else:
            names = ", ".join(COMMANDS)
            raise InputError(f"{printable(word)}: give one of {names}; a space before it makes the line a question")

    def _write(self, prompt: Callable[[], Sequence[int]]) -> None:
        """Prints the answer to a prompt as it is generated, and keeps it, also where Ctrl-C ends it."""
        chat, before = self._chat, self._chat.num_left_out
        ids = prompt()
        if chat.num_left_out > before:
            number = chat.num_left_out
            oldest = "oldest question and its answer" if number == 1 else f"{number} oldest questions and their answers"
            note(f"the context is full: the model no longer sees the {oldest}")
        turn, ended = chat.turns[-1], None
        for part in self._answer(ids, seed_of(self._seed, len(chat.turns) - 1, turn.attempt)):
            turn.answer += part.text
            print(part.text, end="", flush=True)
            ended = part.ended
        print(flush=True)
        if ended == "length":
            note("the answer ends here: it has --max_new_tokens, or fills the context")


def piped_line() -> str:
    """Returns the next line of standard input, without its end. EOFError where there is none."""
    line = sys.stdin.readline(LONGEST_LINE + 1)
    if not line:
        raise EOFError
    if len(line) > LONGEST_LINE:
        raise InputError(f"standard input has a line of more than {LONGEST_LINE:,} characters; give shorter questions")
    return line.removesuffix("\n")


def valid(question: str) -> str:
    """Returns a question. InputError if it had bytes that are not UTF-8, which reach Python as lone surrogates."""
    try:
        return text(question)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"the question is {error}; ask it in UTF-8") from None


def seed_of(seed: int, turn: int, attempt: int) -> int:
    """Returns the seed of an attempt at the answer of a turn, both from 0: a hash, in 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {turn} {attempt}".encode()).digest()[:4]) >> 1


def save(name: str, messages: list[dict[str, Any]]) -> str:
    """Appends a conversation to a file as a line of JSON; returns a sentence about that. InputError if it cannot."""
    try:
        file = Path(one_line(name))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"/save: the file's name {error}") from None
    if file.suffix != ".jsonl" or (file.exists() and not file.is_file()):
        raise InputError(f"/save {file}: name a file that ends with .jsonl, as those of a corpus of conversations do")
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if not num_answers:
        raise InputError("/save: there is no answer yet; ask a question first")
    line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
    try:
        with file.open("a+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(size - 1, 0))
            is_whole = stream.read() in (b"", b"\n")
            stream.write(line if is_whole else b"\n" + line)
    except OSError as error:
        raise InputError(f"/save {file}: {error.strerror}; name another file") from None
    return f"{file}: appended a conversation with {num_answers} answer{'s' if num_answers > 1 else ''}"


def note(sentence: str) -> None:
    """Prints what is no part of an answer on standard error, dim on a terminal."""
    sys.stdout.flush()
    shown = printable(sentence)
    print(f"{DIM}{shown}{PLAIN}" if is_colored(sys.stderr) else shown, file=sys.stderr, flush=True)
