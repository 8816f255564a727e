"""Chat templates: Jinja programs that write a conversation as one text, as in Hugging Face Transformers.

They come with other people's tokenizers, so they run in Jinja's sandbox, without files or attributes of Python, and
with limits on loops, on texts that are multiplied, and on what is written. (A template may still ask for much memory by
other means, such as a text that is joined with itself again and again.) Their clock stands still at `TODAY`: a batch
depends on no date.
"""

import datetime
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.errors import BadText, InputError
from data.printable import printable_name

# Turns of loops and calls of macros, and characters, of one rendering.
MAX_TURNS = 10**6
MAX_CHARACTERS = 2**26
MAX_POWER = 1000
# The date that Llama 3's own template takes where there is no clock.
TODAY = datetime.datetime(2024, 7, 26)
# A template may fail as any program does.
FAULTS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError
)  # fmt: skip


class ChatTemplate:
    """A template, compiled.

    Args:
        source: the program.
        name: its file or tokenizer, for messages.
        variables: names that it may use, such as `bos_token`.
        marks: tokens that have a meaning of their own, and may therefore stand in no message.

    Raises:
        InputError: the program has an error of syntax, with its line.
    """

    def __init__(self, source: str, name: str, variables: Mapping[str, str], marks: Sequence[str]):
        self.source, self.name, self.marks = source, name, sorted(marks, key=len, reverse=True)
        self._variables = dict(variables)
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Limits, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
        # The same conversation gives the same text.
        del environment.filters["random"], environment.globals["lipsum"]
        limits = environment.extensions[_Limits.identifier]
        assert isinstance(limits, _Limits)
        self._limits = limits
        try:
            self._template = environment.from_string(_counted(environment.parse(source), environment))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the chat template of {name}, line {error.lineno}: {error.message}; mend it") from None
        except FAULTS as error:
            raise InputError(f"the chat template of {name} cannot be read: {error}; mend it") from None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the program."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], prompts: bool = False) -> str:
        """Returns the text of a conversation; if it `prompts`, it ends where the next answer begins.

        Raises:
            BadText: the template refuses the conversation, fails, or goes beyond its limits.
        """
        self._limits.begin()
        blocks, left = [], MAX_CHARACTERS
        try:
            for block in self._template.generate(
                self._variables, messages=messages, tools=None, documents=None, add_generation_prompt=prompts
            ):
                blocks.append(block)
                if (left := left - len(block)) < 0:
                    raise jinja2.TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
        except FAULTS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            reason = printable_name(reason[:300])
            raise BadText(f"the chat template of {self.name} does not render it: {reason}") from None
        return "".join(blocks)


class _Limits(Extension):
    """Counts the turns of loops, and reads the tag `generation`, which Transformers has for its own masks."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        # Several threads may render at the same time.
        self._thread = threading.local()

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def begin(self) -> None:
        """Begins a rendering."""
        self._thread.turns = 0

    def turn(self) -> bool:
        """Counts a turn."""
        self._thread.turns += 1
        if self._thread.turns > MAX_TURNS:
            raise jinja2.TemplateError(f"its loops go on for more than {MAX_TURNS:,} turns")
        return True


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a product or a sum does not fill the memory."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [x if isinstance(x, int) else len(x) for x in (left, right) if hasattr(x, "__len__") or type(x) is int]
        if len(sizes) == 2 and not (type(left) is int and type(right) is int and operator != "**"):
            size = {"*": sizes[0] * sizes[1], "+": sum(sizes), "**": 0}[operator]
            if size > MAX_CHARACTERS or (operator == "**" and max(map(abs, sizes)) > MAX_POWER):
                raise jinja2.TemplateError(f"its operator {operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _counted(tree: nodes.Template, environment: jinja2.Environment) -> nodes.Template:
    """Returns a program that counts the turns of its loops and the calls of its macros."""

    def turn() -> nodes.Expr:
        return nodes.Call(nodes.ExtensionAttribute(_Limits.identifier, "turn"), [], [], None, None)

    for node in [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]:
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        node.body.insert(0, nodes.ExprStmt(turn(), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(turn(), node.test)
    return tree.set_environment(environment)  # type: ignore[return-value]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Returns JSON; Jinja's own filter escapes what HTML would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
