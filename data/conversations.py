"""Conversations to tokens: a template writes the text, one pass of the tokenizer gives ids and mask.

The ids are those of the whole text with its marks as tokens, as Transformers' `apply_chat_template` and llama.cpp give
them. Nothing stands before or after them that the template does not write. A token is trained on if it holds a
character that is (see `data.formats.conversation`), also where it begins before the answer.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.config import DataConfig
from data.errors import BadText, InputError
from data.files.json_file import read_small_file
from data.formats import Answers, Conversations
from data.segmenter import DocumentPairs
from data.tokenizer.tokenizer import END_OF_TEXT, FIM_TOKENS, UNKNOWN, Tokenizer

if TYPE_CHECKING:
    from data.formats.template import ChatTemplate

log = logging.getLogger("ziggurat")
# A function from a text with marks to its token ids, int32 [n], and their characters [begin, end), int64 [n, 2].
EncodeMarked = Callable[[str], tuple[np.ndarray, np.ndarray]]
# Tokens at the end of an answer among which its marks are.
MOST_ENDS = 3
EXAMPLE = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def trained_tokens(text: str, spans_n2: np.ndarray, answers: Answers) -> np.ndarray:
    """Returns true for each token that holds a character of an answer, bool [n]."""
    trained = np.zeros(len(text) + 1, np.int64)
    for begin, end in answers:
        trained[begin : min(end, len(text))] = 1
    before = np.concatenate([[0], np.cumsum(trained)])
    begins, ends = spans_n2[:, 0], spans_n2[:, 1]
    # A token without a character of its own counts with the one at which it stands.
    return before[np.maximum(ends, begins + 1)] > before[begins]


def conversation_pairs(
    encode_marked: EncodeMarked, text: str, answers: Answers, first_pair: int = 0, document: Any = None
) -> DocumentPairs:
    """Returns the pairs of a conversation's tokens x1 … xn: x1 → x2, …, xn−1 → xn."""
    ids, spans_n2 = encode_marked(text)
    trained = trained_tokens(text, spans_n2, answers)
    return DocumentPairs(ids[:-1], ids[1:], trained[1:], first_pair, document)


def open_template(config: DataConfig, tokenizer: Tokenizer | None) -> "ChatTemplate | None":
    """Returns the template of the config's conversations; None if it has none.

    Args:
        tokenizer: the run's; None for one of ours that is not trained yet.

    Raises:
        InputError: there is no template, or it has an error.
    """
    if not config.converses:
        return None
    # Jinja, which takes a tenth of a second to start, is for conversations alone.
    from data.formats.template import ChatTemplate

    if config.chat_template is not None:
        file = Path(config.chat_template).expanduser()
        if not file.is_file():
            raise InputError(f"data.chat_template = {config.chat_template}: there is no such file; name a Jinja file")
        source, name = read_small_file(file).decode(errors="replace"), str(file)
    elif tokenizer is not None and tokenizer.chat_template is not None:
        source, name = tokenizer.chat_template, f"the tokenizer of {tokenizer.folder}"
    else:
        of = f"the tokenizer of {tokenizer.folder}" if tokenizer else "a tokenizer that the run trains"
        raise InputError(
            f"data.messages_field: {of} has no chat template; name a file with data.chat_template, such as "
            "examples/chat_template.jinja"
        )
    if tokenizer is not None:
        return ChatTemplate(source, name, tokenizer.named_tokens, tokenizer.special_tokens)
    marks = [UNKNOWN, END_OF_TEXT, *(FIM_TOKENS if config.fills_in else ())]
    return ChatTemplate(source, name, Tokenizer.named_tokens, marks)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """True if conversations begin with the token that stands before a text, because the template writes it."""
    template = open_template(DataConfig(messages_field="messages"), tokenizer)
    assert template is not None
    ids, _ = tokenizer.encode_marked(template.render(EXAMPLE))
    return [*ids[:1]] == tokenizer.bos_ids[:1]


def tokens_that_end(template: "ChatTemplate", tokenizer: Tokenizer) -> list[int]:
    """Returns the special tokens with which an answer ends; warns if there are none, or a prompt has other ids.

    Without one, a model cannot learn where to stop. A prompt that ends inside a token has not the ids with which the
    conversation begins, so generation would see what training did not.

    Raises:
        InputError: the template does not render a question and its answer.
    """
    try:
        document = Conversations("messages", template).document(EXAMPLE)
        prompt = template.render(EXAMPLE[:1], prompts=True)
    except BadText as error:
        raise InputError(f"data.chat_template: a question and its answer: {error}") from None
    ids, spans_n2 = tokenizer.encode_marked(document.text)
    before, _ = tokenizer.encode_marked(prompt)
    if before.tolist() != ids[: len(before)].tolist():
        log.warning(
            "the chat template of %s ends a prompt with %r, which joins the answer in one token, so a model that "
            "answers sees other tokens than in training; let it end before the whitespace, or after a mark",
            template.name,
            prompt[-20:],
        )
    trained = ids[trained_tokens(document.text, spans_n2, document.answers or ())].tolist()
    special = {*template.marks}
    marks = [token for token in trained[-MOST_ENDS:] if tokenizer.pieces[token] in special]
    if trained[-1] not in marks:
        log.warning(
            "the chat template of %s ends an answer with %r, and not with a special token such as eos_token, at which "
            "generation would stop",
            template.name,
            document.text[-20:],
        )
        return []
    return marks
