"""Texts for tests: a small corpus of code, and what breaks tokenizers."""

import sysconfig
from functools import cache
from pathlib import Path

NASTY = [
    "",
    " ",
    "\n",
    "  two  spaces   three    four\t\ttabs \t mixed\n\n\n    indented\n\tand tab",
    "CRLF\r\nlines\r\n\r\nand a lone\rreturn",
    "\u2581 is not a space \u2581\u2581, nor \ue000, \ue0000, \ue0001 or \ue000\u2581",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 and e\u0301 é ﬁ Å ㍿ Ⅷ",
    "日本語のテキスト، نص عربي, हिन्दी",
    "<|endoftext|> <unk> <s> </s> <0x41> <0x0A>",
    "nul \0 and \ufffd and \u200b and \ufeff",
    " leading and trailing ",
    "=" * 79 + "-" * 65 + "#" * 33 + "a" * 40 + "ab" * 31,
    "x" * 5000 + " " * 3000 + "y",
]


@cache
def code() -> tuple[str, ...]:
    """Source files of the standard library, about 1.5 MB; every eighth is meant to be held out."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(file.read_text(encoding="utf-8") for file in sorted(root.glob("[a-m]*.py")))
