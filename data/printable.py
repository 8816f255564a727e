"""Text of others made fit to be shown: without control characters, and without the credentials of URLs.

Names of files, texts of corpora and samples of a model come from elsewhere. Written raw to a terminal they could move
its cursor or retitle its window; in a script, a manifest or a model card, a line end could begin a line of its own.
"""

import os
import re

from settings import text_problem

HIDDEN = "…"
# Control characters but tab and line feed, what ends lines or turns the direction of writing elsewhere, and halves of
# surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # fmt: skip
_USER = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*)://([^/\s'\"]*)@")
_QUERY = re.compile(r"\b(https?://[^\s'\"?]*\?)[^\s'\"<>()]+", re.IGNORECASE)
# Protocols whose URLs name a container before the @, which is no secret.
_CONTAINER = re.compile(r"abfss?|wasbs?", re.IGNORECASE)


def shown(text: str) -> str:
    """Returns a text as it is logged and published: printable, and without credentials."""
    return printable(without_credentials(text))


def printable(text: str) -> str:
    r"""Returns a text with escapes such as \x1b for the characters that a terminal would act on."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_name(name: str) -> str:
    """Returns a file's name for a message: line ends and bytes that are no UTF-8 are escaped, too."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def without_credentials(text: str) -> str:
    """Returns a text whose URLs have … for user and password, and for a query, which often holds a signature."""
    if "://" not in text:
        return text
    text = _USER.sub(lambda match: match[0] if _CONTAINER.fullmatch(match[1]) else f"{match[1]}://{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", text)


def lacks_credentials(url: str) -> bool:
    """True for a URL that has lost something to `without_credentials`."""
    return "://" in url and (f"//{HIDDEN}@" in url or url.endswith(f"?{HIDDEN}"))


def name_problem(name: str) -> str:
    """Returns why a text cannot name a file, a folder or a job; an empty text where it can."""
    if not name:
        return "is empty; give a name"
    if problem := text_problem(name):
        return problem.strip()
    if _UNPRINTABLE.search(name) or "\t" in name or "\n" in name:
        return "has a line end or another control character; give another name"
    if os.path.expanduser(name).startswith("~"):
        return f"begins with {name.partition('/')[0]}, and there is no such home folder; write the folder's name"
    return ""
