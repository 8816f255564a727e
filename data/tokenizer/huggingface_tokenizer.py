"""Tokenizers of other projects: a folder with a `tokenizer.json`, read by Hugging Face's `tokenizers`.

Byte-level BPE (GPT-2, Llama 3, Qwen) and vocabularies with byte fallback (Llama 2, Mistral, Gemma) are supported: both
have a token for every byte, so every text has tokens. Ids are those of Transformers' tokenizer without special tokens;
names of special tokens inside a text are plain text. Such a tokenizer may normalize a text (Qwen composes characters,
Llama 2 puts a space before it), so decoding returns the normalized text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from data.errors import InputError
from data.files.json_file import parse_json, read_json, read_small_file
from data.tokenizer.tokenizer import FIM_TOKENS, JSON_FILE, SPACE, TEMPLATE_FILE, Tokenizer

CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
GENERATION_FILE = "generation_config.json"
# Other files that may hold the id of the EOS token.
MODEL_CONFIG_FILES = (GENERATION_FILE, "config.json")
# Tokens that mark prefix, suffix and middle: Qwen's, which are ours too, and those of StarCoder, SantaCoder,
# DeepSeek-Coder and Code Llama.
KNOWN_FIM_TOKENS = (
    FIM_TOKENS,
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)
# The key of `tokenizer_config.json` under which a run's copy names others.
FIM_KEY = "fim_tokens"
# Classes of Transformers that take this setting of `tokenizer_config.json` before that of GPT-2's pre-tokenizer.
PREFIX_SPACE = "add_prefix_space"
PREFIX_SPACE_CLASSES = {"GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", "CodeGenTokenizerFast"}
MOST_IDS = 2**23
# Characters that a normalizer's replacements may make of one.
MOST_GROWTH = 256
# The class of Transformers that takes all of its pre-tokenizer from `tokenizer.json`.
FROM_JSON_ALONE = "PreTrainedTokenizerFast"
STEP_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


@contextmanager
def _faults_of(file: Path) -> Iterator[None]:
    """Raises InputError for what the library says about a file, also in a panic, which is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{file} is damaged, or no tokenizer ({error}); restore it") from None


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json`. `tokenizer_config.json` or the model's config names the EOS token.

    Attributes:
        byte_level: true if every character of a piece stands for a byte, as in GPT-2; otherwise pieces are text, and
            bytes have pieces of their own.
        settings: content of `tokenizer.json` without vocabulary and merges.

    Raises:
        InputError: a file is damaged, there is no such token, or some bytes have no token.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        content = read_small_file(folder / JSON_FILE)
        with _faults_of(folder / JSON_FILE):
            self.settings = parse_json(content.decode())
            self._model = tokenizers.Tokenizer.from_buffer(content)
        self._check_growth()
        added = self._add_tokens()
        prefix_space = self._set_prefix_space()
        # The merges take most memory of the file; they are read again when they are needed.
        for large in ("vocab", "merges"):
            self.settings["model"].pop(large, None)
        # Truncation and padding are for single texts, not for a corpus.
        self._model.no_truncation()
        self._model.no_padding()
        if self.settings["model"].get("dropout"):
            self._model.model.dropout = None
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        if self.vocab_size > MOST_IDS:
            raise InputError(
                f"{folder / JSON_FILE} has the id {self.vocab_size - 1:,}; at most {MOST_IDS:,} ids are read"
            )
        self.pieces = [""] * self.vocab_size
        for piece, i in vocabulary.items():
            self.pieces[i] = piece
        self._decoders = self.steps("decoder")
        self.byte_level = any(step["type"] == "ByteLevel" for step in self._decoders)
        wanted = BYTE_OF_CHARACTER.keys() if self.byte_level else {f"<0x{byte:02X}>" for byte in range(256)}
        falls_back = self.byte_level or self.settings["model"].get("byte_fallback")
        if not falls_back or not wanted <= vocabulary.keys():
            raise InputError(
                f"{folder / JSON_FILE} is neither byte-level nor has it byte fallback, so it would lose text; take "
                "another tokenizer"
            )
        config = _read(folder / CONFIG_FILE)
        self._check_space(config)
        self.eos_id = self._find_eos()
        # The tokens that its post-processor puts before a text, as in Llama and Gemma.
        with _faults_of(folder / JSON_FILE):
            encoded = self._model.encode("a")
        num_before = next((i for i, special in enumerate(encoded.special_tokens_mask) if not special), 0)
        self.bos_ids = encoded.ids[:num_before] or [self.eos_id]
        if unknown := [i for i in self.bos_ids if not 0 <= i < self.vocab_size]:
            raise InputError(f"{folder / JSON_FILE}: its post-processor puts the unknown id {unknown[0]} before a text")
        identity = f"\0{self.eos_id}" + (json.dumps(added) if added else "") + prefix_space
        self.fingerprint = hashlib.sha256(content + identity.encode()).hexdigest()
        self.generation_config = _read(folder / GENERATION_FILE) or {
            name: value for name, value in _read(folder / "config.json").items() if name == "eos_token_id" and value
        }
        template = folder / TEMPLATE_FILE
        self.chat_template = _template_of(config)
        if template.is_file():
            self.chat_template = read_small_file(template).decode(errors="replace")
        self.named_tokens = {"eos_token": self.pieces[self.eos_id]} | _named_tokens(config)
        self.fim_tokens = self._find_fim_tokens(config)
        self.adds_space = b"".join(map(self.token_bytes, self.encode("a"))) == b" a"

    def _check_growth(self) -> None:
        """Raises InputError if the normalizer can make a text too long for the memory."""
        growth = 1.0
        for step in self.steps("normalizer"):
            if step["type"] == "Replace":
                # A regular expression may match every character, or between any two.
                growth *= max(1, len(step["content"]) / (len(step["pattern"].get("String", "")) or 1))
        if growth > MOST_GROWTH:
            raise InputError(
                f"{self.folder / JSON_FILE}: its normalizer can make a text {growth:,.0f} times as long; take another "
                "tokenizer"
            )

    def _check_space(self, config: Mapping[str, Any]) -> None:
        """Raises InputError if `tokenizer_config.json` and `tokenizer.json` disagree about a space before a text."""
        spaces = {step["add_prefix_space"] for step in self.steps("pre_tokenizer") if step["type"] == "ByteLevel"}
        asked, kind = config.get("add_prefix_space"), config.get("tokenizer_class", FROM_JSON_ALONE)
        if isinstance(asked, bool) and spaces - {asked} and kind != FROM_JSON_ALONE:
            raise InputError(
                f"{self.folder / CONFIG_FILE} says add_prefix_space = {asked}, and {JSON_FILE} does not; save the "
                "tokenizer again with Transformers"
            )

    def _add_tokens(self) -> list[tuple[int, str]]:
        """Adds the tokens that only `tokenizer_config.json` or `added_tokens.json` names; returns them."""
        config = _read(self.folder / CONFIG_FILE)
        named: dict[str, Any] = {text: {"id": i} for text, i in _read(self.folder / ADDED_FILE).items()}
        for i, token in dict(config.get("added_tokens_decoder") or {}).items():
            if isinstance(token, dict) and isinstance(token.get("content"), str) and i.isdecimal():
                named[token["content"]] = token | {"id": int(i)}
        known = self._model.get_vocab(with_added_tokens=True)
        new = {text: token for text, token in named.items() if text not in known and type(token["id"]) is int}
        added = []
        for text, token in sorted(new.items(), key=lambda item: item[1]["id"]):
            flags = {
                name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            }
            self._model.add_tokens([tokenizers.AddedToken(text, **flags)])
            if self._model.token_to_id(text) != token["id"]:
                raise InputError(
                    f"{self.folder}: the added token {text!r} has the id {token['id']}, which does not follow those of "
                    f"{JSON_FILE}; save the tokenizer again with Transformers"
                )
            added.append((token["id"], text))
        return added

    def _set_prefix_space(self) -> str:
        """Puts a space before a text, or none, as the class does; returns what this changes of `tokenizer.json`."""
        config, step = _read(self.folder / CONFIG_FILE), self.settings.get("pre_tokenizer") or {}
        wanted = bool(config.get(PREFIX_SPACE))
        takes = str(config.get("tokenizer_class")) in PREFIX_SPACE_CLASSES and step.get("type") == "ByteLevel"
        if not takes or step[PREFIX_SPACE] == wanted:
            return ""
        step[PREFIX_SPACE] = wanted
        self._model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(wanted, use_regex=step.get("use_regex", True))
        return f"{PREFIX_SPACE}={wanted}"

    def _find_eos(self) -> int:
        if (named := _eos_token(_read(self.folder / CONFIG_FILE))) is not None:
            token = self._model.token_to_id(named)
            if token is None:
                raise InputError(f"{self.folder / CONFIG_FILE}: eos_token = {named!r} is no token of {JSON_FILE}")
            return int(token)
        for name in MODEL_CONFIG_FILES:
            eos_id = _read(self.folder / name).get("eos_token_id")
            # Chat models have several; the first ends a text.
            eos_id = eos_id[0] if isinstance(eos_id, list) and eos_id else eos_id
            if type(eos_id) is int:
                if 0 <= eos_id < self.vocab_size and self.pieces[eos_id]:
                    return eos_id
                raise InputError(f"{self.folder / name}: eos_token_id = {eos_id} is no token of {JSON_FILE}")
        raise InputError(
            f"{self.folder} names no token that ends a document; give eos_token in {CONFIG_FILE}, which may hold "
            '{"eos_token": "..."} alone'
        )

    def _find_fim_tokens(self, config: Mapping[str, Any]) -> tuple[str, str, str] | None:
        named, added = config.get(FIM_KEY), self.added_tokens
        is_named = isinstance(named, list) and len(named) == 3 and all(isinstance(name, str) for name in named)
        known = (*([tuple(named)] if is_named and named else []), *KNOWN_FIM_TOKENS)
        return next((names for names in known if {*names} <= added), None)

    def steps(self, part: str) -> list[dict[str, Any]]:
        """Returns the steps of the normalizer, pre_tokenizer or decoder as a list."""
        settings = self.settings.get(part)
        if settings is None:
            return []
        return settings[STEP_LISTS[part]] if settings["type"] == "Sequence" else [settings]

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces, in the order in which they are merged."""
        pairs = parse_json(read_small_file(self.folder / JSON_FILE).decode())["model"].get("merges", [])
        return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in pairs]

    def files(self) -> dict[str, bytes]:
        config = _read(self.folder / CONFIG_FILE)
        if _eos_token(config) is None:
            config["eos_token"] = self.pieces[self.eos_id]
        if self.fim_tokens and self.fim_tokens != self._find_fim_tokens(config):
            config[FIM_KEY] = [*self.fim_tokens]
        kept = {name: self.folder / name for name in (TEMPLATE_FILE, ADDED_FILE)}
        generation = {GENERATION_FILE: (json.dumps(self.generation_config, indent=2) + "\n").encode()}
        return {name: read_small_file(file) for name, file in kept.items() if file.is_file()} | {
            **(generation if self.generation_config else {}),
            CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
            JSON_FILE: (self.folder / JSON_FILE).read_bytes(),
        }

    def encode(self, text: str) -> np.ndarray:
        text.encode()  # raises ValueError for lone surrogates
        # A batch of one, because that skips the offsets of tokens.
        with _faults_of(self.folder / JSON_FILE):
            return np.array(self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        text.encode()  # raises ValueError for lone surrogates
        with _faults_of(self.folder / JSON_FILE):
            encoded = self._finds_marks.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.int32), np.array(encoded.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def _finds_marks(self) -> tokenizers.Tokenizer:
        with _faults_of(self.folder / JSON_FILE):
            model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.encode_special_tokens = False
        # GPT-2's would leave a space before a word out of its offsets.
        model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        return model

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids that begin a text, without the space that was put before it."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = self._model.get_added_tokens_decoder()
        spaces = any(
            (step["type"] == "Replace" and step["pattern"] == {"String": SPACE} and step["content"] == " ")
            or (step["type"] == "Metaspace" and step.get("replacement") == SPACE)
            for step in self._decoders
        )

        def of_piece(i: int, piece: str) -> bytes:
            if i in added and added[i].special:
                return b""
            # A piece with other characters stands for itself, as in the library.
            if self.byte_level and i not in added and BYTE_OF_CHARACTER.keys() >= set(piece):
                return bytes(map(BYTE_OF_CHARACTER.__getitem__, piece))
            if not self.byte_level and BYTE_PIECE.fullmatch(piece):
                return bytes.fromhex(piece[3:5])
            return (piece.replace(SPACE, " ") if spaces else piece).encode()

        return [of_piece(i, piece) for i, piece in enumerate(self.pieces)]

    @cached_property
    def token_kinds(self) -> list[str]:
        added, unknown = self._model.get_added_tokens_decoder(), self.settings["model"].get("unk_token")
        return [
            "unused" if not piece
            else "unknown" if piece == unknown
            else "control" if i in added and added[i].special
            else "whole" if i in added
            else "byte" if not self.byte_level and BYTE_PIECE.fullmatch(piece)
            else "piece"
            for i, piece in enumerate(self.pieces)
        ]  # fmt: skip


# GPT-2's byte alphabet (Radford et al. 2019, section 2.2): printable characters of Latin-1 stand for their own bytes,
# and those from U+0100 on, in order, for the others.
_PRINTABLE = [ord(character) for character in tokenizers.pre_tokenizers.ByteLevel.alphabet() if ord(character) < 256]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + k): byte for k, byte in enumerate(_OTHERS)}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tokens that a `tokenizer_config.json` has names for, such as "eos_token"."""
    tokens = {name: token for name, token in config.items() if name.endswith("_token")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _eos_token(config: Mapping[str, Any]) -> str | None:
    return _named_tokens(config).get("eos_token")


def _template_of(config: Mapping[str, Any]) -> str | None:
    """Returns the template in a `tokenizer_config.json`, the default one of several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _read(file: Path) -> dict[str, Any]:
    """Returns the settings in a file, or an empty dictionary if it is missing."""
    if not file.is_file():
        return {}
    return read_json(file)
