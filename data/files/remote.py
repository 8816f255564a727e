"""Filesystems of fsspec: opening them, the meaning of their errors, and retries.

Transient errors (dropped connections, timeouts, overloaded servers) are retried with growing delays.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

import fsspec

from data.errors import InputError

log = logging.getLogger("ziggurat")
for library in ("gcsfs", "google.auth"):  # They log each error, with a traceback, that they also raise.
    logging.getLogger(library).setLevel(logging.CRITICAL)
T = TypeVar("T")
MAX_TRIES = 5
FIRST_DELAY = 0.5  # seconds, doubled with each try
sleep = time.sleep
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# Object stores whose filesystems would answer from cached listings.
_WITH_LISTINGS = ("s3", "gs", "az")
_ALIASES = {"s3a": "s3", "gcs": "gs", "https": "http", "abfs": "az"}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "az": "adlfs"}
_CREDENTIALS = {
    "s3": "they come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role "
    """(for public data: FSSPEC_S3='{"anon": true}')""",
    "gs": "they come from GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine",
    "hf": "they come from HF_TOKEN or `hf auth login`",
}
_OTHER_CREDENTIALS = "they come from fsspec's configuration, ~/.config/fsspec/*.json"
# Errors of the libraries below fsspec that have neither a status nor a common class.
_REFUSALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
    "ClientAuthenticationError",
}
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime", "created")


class RemoteError(Exception):
    """A remote file could not be read after all retries.

    Attributes:
        kind: the reason: "refused", "missing", "changed", "no ranges", "failed", or "outage", which passes.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def protocol(where: str) -> str:
    """Returns the protocol of a URL, as in "s3", or an empty text for a path."""
    match = _URL.match(where)
    return match[1].lower() if match else ""


def store(where: str) -> str:
    """Returns the kind of storage behind a URL: its `protocol`, by the same name for all aliases."""
    return _ALIASES.get(protocol(where), protocol(where))


def filesystem(url: str) -> tuple[Any, str]:
    """Returns the filesystem of a URL, and the URL's path in it.

    Raises:
        InputError: fsspec does not know the protocol, or a package for it is not installed.
    """
    name = store(url)
    if "::" in url:
        raise InputError(f"{url}: filesystems that are chained with '::' are not read; give the address of the files")
    try:
        return fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if name in _WITH_LISTINGS else {}))
    except ImportError as error:
        remedy = f"pip install {_PACKAGES[name]}" if name in _PACKAGES else str(error)
        raise InputError(f"{url}: a package that reads {protocol(url)}:// is missing: {remedy}") from None
    except ValueError as error:
        raise InputError(f"{url}: {error}; s3://, gs://, hf:// and https:// are some of those that are known") from None


def content_version(info: Mapping[str, Any]) -> str:
    """Returns what identifies a file's content: its ETag, or its time of change, or an empty text."""
    value = next((info[key] for key in _VERSIONS if info.get(key)), "")
    # Some filesystems report a number in one call and a time in another.
    return str(value.timestamp() if isinstance(value, datetime) else value)


def with_retries(url: str, call: Callable[[], T]) -> T:
    """Returns the result of a call, which is tried up to MAX_TRIES times; gcsfs itself tries each call six times.

    Raises:
        RemoteError: the call failed permanently, or on every try.
    """
    tried = 0
    tries = 1 if store(url) == "gs" else MAX_TRIES
    while True:
        try:
            return call()
        except Exception as error:  # each filesystem's library has errors of its own
            tried += 1
            kind = _meaning(error)
            *_, cause = _causes(error)
            text = " ".join(f"{type(cause).__name__}: {cause}".split())
            if kind is None:
                raise
            if kind == "refused":
                remedy = f"check the credentials: {_CREDENTIALS.get(store(url), _OTHER_CREDENTIALS)}"
                raise RemoteError(kind, f"access is refused ({text}); {remedy}") from None
            if kind != "passing":
                raise RemoteError(kind, f"cannot be read ({text})") from None
            if tried == tries:
                raise RemoteError(
                    "outage",
                    f"cannot be read after {tries} tries ({text})" if tries > 1 else f"cannot be reached ({text})",
                ) from None
            delay = FIRST_DELAY * 2 ** (tried - 1)
            log.warning("%s: %s; trying again in %.1f s (%d of %d)", url, text, delay, tried + 1, tries)
            sleep(delay)


def _meaning(error: Exception) -> str | None:
    """Returns a kind of `RemoteError`, "passing" for a transient error, or None for a fault of the program."""
    if isinstance(error, RemoteError):
        return error.kind
    status = next(filter(None, map(_status, _causes(error))), 0)
    names = {type(cause).__name__ for cause in _causes(error)}
    is_forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden:")  # gcsfs's 403
    if isinstance(error, PermissionError) or status in (401, 403, 407) or names & _REFUSALS or is_forbidden:
        return "refused"
    if "FileExpired" in names or status == 412:
        return "changed"
    if status in (404, 410):
        return "missing"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return "no ranges"
    if isinstance(error, TimeoutError) or status in (408, 425, 429) or status >= 500:
        return "passing"
    if status >= 400:
        return "failed"
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        # The HTTP filesystem also says so where the server was not reached.
        return "passing" if any(_is_connection(cause) for cause in _causes(error)) else "missing"
    return "passing" if _is_connection(error) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int:
    """Returns the HTTP status of an error of aiohttp, requests, httpx, gcsfs or botocore, or 0."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    value = getattr(error, "status", None) or getattr(response, "status_code", None)
    # aiohttp calls a connection that was dropped a bad message of code 400.
    if value is None and not type(error).__module__.startswith("aiohttp"):
        value = getattr(error, "code", None)
    return value if isinstance(value, int) else 0


def _is_connection(error: BaseException) -> bool:
    """True for a connection error of the system or of a library below fsspec, and not for one about the path."""
    if isinstance(error, ValueError | FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"
