"""Files elsewhere: a real S3 server and a bad HTTP server, both on this machine."""

import contextlib
import dataclasses
import itertools
import logging
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus import open_corpus
from data.errors import BadText, InputError
from data.files import remote
from data.files.listing import File, fingerprint, list_files, open_file
from data.files.ranges import READ_TOTALS
from data.formats import ENDINGS, Fields, RawDocument, parquet, read_documents
from data.mixture import initial_positions, open_mixture, open_streams
from tests.data.stand_in import ByteTokenizer, tokenize
from tests.peers import require

CONTENT = b"".join(b'{"text": "document %06d %s"}\n' % (i, b"x" * (i % 90)) for i in range(6000))
NAMES = ["b.jsonl", "deep/a.jsonl", "deep/er/c.jsonl"]


@pytest.fixture(autouse=True)
def delays(monkeypatch) -> list[float]:
    """Nothing sleeps; what would have been slept, in seconds."""
    slept: list[float] = []
    monkeypatch.setattr(remote, "sleep", slept.append)
    READ_TOTALS.clear()
    return slept


class Server(ThreadingHTTPServer):
    """Serves `files`, and misbehaves as it is told."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.requests: list[str] = []
        # What the next requests get: a status, or "drop", midway.
        self.faults: list[int | str] = []
        self.with_ranges = self.with_size = True
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        asked = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {path} {asked}")
        content = self.server.files.get(path)
        fault = self.server.faults.pop(0) if self.server.faults else 404 if content is None else None
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        assert content is not None
        first, last = 0, len(content) - 1
        if asked and self.server.with_ranges:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            last = min(last, len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.with_size:
            self.send_header("Content-Length", str(last + 1 - first))
        else:
            self.close_connection = True
        self.send_header("ETag", self.server.etags.get(path, '"one"'))
        self.end_headers()
        if self.command == "GET":
            sent = content[first : last + 1]
            if fault == "drop":
                sent = sent[: len(sent) // 2]
                self.close_connection = True
            with contextlib.suppress(OSError):  # the reader may have seen enough
                self.wfile.write(sent)


@pytest.fixture
def http() -> Iterator[Server]:
    require("aiohttp")
    server = Server()
    server.files = {f"/{name}": CONTENT for name in NAMES}
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = require("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch) -> Iterator[Any]:
    """An S3 client, of a server whose bucket `corpus` holds `NAMES`, a hidden file and a note."""
    s3fs = require("s3fs")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = require("boto3").client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="corpus")
    for name in (*NAMES, ".hidden.jsonl", "note.md"):
        client.put_object(Bucket="corpus", Key=f"data/{name}", Body=CONTENT)
    yield client
    for found in client.list_objects_v2(Bucket="corpus").get("Contents", []):
        client.delete_object(Bucket="corpus", Key=found["Key"])
    client.delete_bucket(Bucket="corpus")
    s3fs.S3FileSystem.clear_instance_cache()


def one(where: str) -> File:
    [file] = list_files(where, ENDINGS)
    return file


def content_of(file: File, begin: int = 0, end: int | None = None) -> bytes:
    with open_file(file, begin, end) as stream:
        return stream.read()


def problem(where: str, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        list_files(where, ENDINGS, **more)
    return str(caught.value)


def test_a_name_that_looks_like_a_glob_is_a_name_where_it_is_there(s3, http):
    for name in ("a[1].jsonl", "a?.jsonl", "a*.jsonl", ".x/a.jsonl"):
        s3.put_object(Bucket="corpus", Key=f"data/{name}", Body=CONTENT)
        assert content_of(one(f"s3://corpus/data/{name}")) == CONTENT
    assert [file.name for file in list_files("s3://corpus/data/.*/*.jsonl", ENDINGS)] == [".x/a.jsonl"]
    http.files["/a%5B1%5D.jsonl"] = CONTENT
    assert content_of(one(f"{http.url}/a[1].jsonl")) == CONTENT


def test_a_bucket_is_listed_as_folder_glob_and_file(s3):
    files = list_files("s3://corpus/data", ENDINGS)
    assert [(file.path, file.name) for file in files] == [(f"s3://corpus/data/{name}", name) for name in NAMES]
    assert {file.size for file in files} == {len(CONTENT)}
    assert all(file.version for file in files)
    assert list_files("s3://corpus/data/", ENDINGS) == files
    assert [file.name for file in list_files("s3://corpus", ENDINGS)] == [f"data/{name}" for name in NAMES]
    assert [file.name for file in list_files("s3://corpus/data/deep/*.jsonl", ENDINGS)] == ["a.jsonl"]
    assert [file.name for file in list_files("s3://corpus/data/**/*.jsonl", ENDINGS)] == NAMES
    assert one("s3://corpus/data/deep/a.jsonl").name == "a.jsonl"
    assert one("s3://corpus/data/deep/a.jsonl").version == files[1].version


def test_what_is_not_in_a_bucket_is_said(s3):
    assert problem("s3://corpus/data/none") == "data.corpus = s3://corpus/data/none: there is no such file or folder"
    assert "there is no such file or folder" in problem("s3://no-such-bucket/data")
    assert "matches no file" in problem("s3://corpus/none/*.jsonl")
    assert "matches no file" in problem("s3://no-such-bucket/*.jsonl")
    assert "note.md is no .txt, .jsonl" in problem("s3://corpus/data/note.md")
    s3.put_object(Bucket="corpus", Key="other/note.md", Body=b"1")
    assert "the folder holds no .txt" in problem("s3://corpus/other", field="data.corpus['a']")


def test_a_file_of_a_bucket_is_read_as_a_local_one(s3, tmp_path: Path):
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    here, there = one(str(tmp_path / "b.jsonl")), one("s3://corpus/data/b.jsonl")
    assert content_of(there) == CONTENT
    assert content_of(there, 1000, 1010) == CONTENT[1000:]
    places = [0, 7, 100_000, len(CONTENT) // 2, len(CONTENT)]
    for begin, end in itertools.pairwise(places):
        assert list(read_documents(there, begin, end, Fields())) == list(read_documents(here, begin, end, Fields()))
    with open_file(there) as stream:
        for at in (5, len(CONTENT) - 3, 200_000):
            stream.seek(at)
            assert stream.read(10) == CONTENT[at : at + 10]
        assert stream.seek(-2, 2) == len(CONTENT) - 2
        assert stream.read() == CONTENT[-2:]


def test_a_parquet_of_a_bucket_is_read_as_a_local_one(s3, tmp_path: Path):
    arrow, writer = require("pyarrow"), require("pyarrow.parquet")
    columns = {"text": [f"{i} " * 100 for i in range(20_000)], "other": [f"{i}y" * 300 for i in range(20_000)]}
    writer.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=2000, compression="none")
    s3.upload_file(str(tmp_path / "a.parquet"), "corpus", "a.parquet")
    here, there = one(str(tmp_path / "a.parquet")), one("s3://corpus/a.parquet")
    for begin, end in ((0, here.size // 3), (here.size // 3, here.size)):
        assert list(read_documents(there, begin, end, Fields())) == list(read_documents(here, begin, end, Fields()))
    parquet.read_footer.cache_clear()
    READ_TOTALS.clear()
    assert next(read_documents(there, 0, there.size, Fields(), 15_000)) == (
        15_000,
        RawDocument(columns["text"][15_000]),
    )
    assert READ_TOTALS["bytes"] < 3_000_000 < there.size / 10


def test_a_small_part_of_a_large_file_costs_little(s3):
    s3.put_object(Bucket="corpus", Key="large.jsonl", Body=CONTENT * 60)
    file = one("s3://corpus/large.jsonl")
    assert READ_TOTALS["bytes"] == 0
    place = len(CONTENT) * 30
    assert next(read_documents(file, len(CONTENT) * 20, file.size, Fields(), place)) == (
        place,
        RawDocument("document 000000 "),
    )
    assert READ_TOTALS["bytes"] == 2**16
    READ_TOTALS.clear()
    found = list(read_documents(file, place, place + 2**20, Fields()))
    assert found[0] == (place, RawDocument("document 000000 "))
    assert READ_TOTALS["bytes"] <= 2**20 + 2**16 + 1
    READ_TOTALS.clear()
    fingerprint(file, whole=True)
    assert READ_TOTALS["bytes"] == 0


def test_a_file_of_a_bucket_that_has_changed_or_vanished_is_not_read(s3):
    file = one("s3://corpus/data/b.jsonl")
    before = fingerprint(file, whole=False)
    with open_file(file) as stream:
        stream.read(10)
        s3.put_object(Bucket="corpus", Key="data/b.jsonl", Body=CONTENT[::-1])
        with pytest.raises(BadText, match="has changed since the run listed it"):
            stream.read()
    with pytest.raises(BadText, match="has changed since the run listed it"):
        content_of(file)
    assert content_of(one(file.path)) == CONTENT[::-1]
    assert fingerprint(one(file.path), whole=False) != before
    s3.put_object(Bucket="corpus", Key="data/b.jsonl", Body=CONTENT[:100])
    with pytest.raises(BadText, match="has changed since the run listed it"):
        content_of(file)
    s3.delete_object(Bucket="corpus", Key="data/b.jsonl")
    with pytest.raises(BadText, match="has vanished since the run listed it"):
        content_of(file)


def test_missing_credentials_are_named_with_where_they_come_from(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for where in ("s3://corpus/data", "s3://corpus/data/*.jsonl"):
        require("s3fs").S3FileSystem.clear_instance_cache()
        said = problem(where)
        assert "access is refused" in said
        assert "AWS_ACCESS_KEY_ID" in said


def test_a_server_that_is_not_there_is_said_after_some_tries(monkeypatch, caplog, delays):
    require("aiohttp")
    server = Server()
    server.server_close()
    # An outage, and not the user's error.
    with pytest.raises(ConnectionError, match=f"cannot be read after {remote.MAX_TRIES} tries"):
        list_files(f"{server.url}/a.jsonl", ENDINGS)
    assert delays == [0.5, 1, 2, 4]
    assert "trying again in 4.0 s (5 of 5)" in caplog.text


def test_an_address_is_listed_and_read(http):
    file = one(f"{http.url}/b.jsonl?token=x")
    assert (file.name, file.size, file.version) == ("b.jsonl", len(CONTENT), '"one"')
    assert not [request for request in http.requests if not request.startswith("HEAD")]
    assert content_of(file) == CONTENT
    assert {request.split()[0] for request in http.requests if "bytes=" not in request} == {"HEAD"}
    assert problem(f"{http.url}/none.jsonl").endswith("there is no such file or folder")
    http.files["/a.csv"] = b"1"
    assert "a.csv is no .txt" in problem(f"{http.url}/a.csv")


def test_a_page_of_links_is_a_folder(http):
    http.files["/data/"] = b"".join(
        b'<a href="%s">' % name for name in (b"../", b"?C=N", b"a.jsonl", b"b.md", b"c.txt")
    )
    http.files |= {"/data/a.jsonl": CONTENT, "/data/c.txt": b"12"}
    listed = [("a.jsonl", len(CONTENT)), ("c.txt", 2)]
    assert [(file.name, file.size) for file in list_files(f"{http.url}/data/", ENDINGS)] == listed
    assert [file.name for file in list_files(f"{http.url}/data/*.jsonl", ENDINGS)] == ["a.jsonl"]


@pytest.mark.parametrize("fault", ["drop", 500, 503, 429])
def test_what_may_pass_is_tried_again_and_logged(http, caplog, delays, fault):
    file = one(f"{http.url}/b.jsonl")
    with caplog.at_level(logging.WARNING, "ziggurat"), open_file(file) as stream:
        found = stream.read(10)
        for _ in range(2):
            # After a delay of 1 s the next range begins with the first delay again.
            http.faults = [fault, fault]
            found += stream.read(100_000)
        found += stream.read()
    assert found == CONTENT
    assert delays == [0.5, 1.0]
    assert caplog.text.count("trying again in") == 2
    assert f"{file.path}: " in caplog.text


def test_a_file_that_fails_each_time_is_given_up(http, delays):
    file = one(f"{http.url}/b.jsonl")
    with open_file(file) as stream:
        stream.read(2**16)
        http.faults = ["drop"] * remote.MAX_TRIES
        with pytest.raises(ConnectionError, match=f"cannot be read after {remote.MAX_TRIES} tries"):
            stream.read()
        assert delays == [0.5, 1, 2, 4]
        # A new outage has as many tries.
        assert stream.read(10)
    http.faults = [503] * 2 * remote.MAX_TRIES
    with pytest.raises(ConnectionError, match="503"):
        content_of(file)


def test_a_read_goes_on_after_each_drop(http):
    file = one(f"{http.url}/b.jsonl")
    with open_file(file) as stream:
        http.faults = ["drop"] * (remote.MAX_TRIES - 1)
        assert stream.read(2**16) == CONTENT[: 2**16]
        http.faults = ["drop"] * (remote.MAX_TRIES - 1)
        assert stream.read() == CONTENT[2**16 :]


def test_a_file_at_an_address_that_has_changed_or_vanished_is_not_read(http):
    file = one(f"{http.url}/b.jsonl")
    with open_file(file) as stream:
        stream.read(10)
        http.files["/b.jsonl"] = CONTENT[:100_000]
        with pytest.raises(BadText, match="has changed since the run listed it"):
            stream.read()
    with pytest.raises(BadText, match="has changed since the run listed it"):
        content_of(file)
    http.files["/b.jsonl"] = CONTENT
    assert content_of(file) == CONTENT
    http.etags["/b.jsonl"] = '"two"'
    with pytest.raises(BadText, match="has changed since the run listed it"):
        content_of(file)
    del http.files["/b.jsonl"]
    with pytest.raises(BadText, match="has vanished since the run listed it"):
        content_of(file)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_ends_the_run_without_more_tries(http, delays, status):
    file = one(f"{http.url}/b.jsonl")
    for read_or_list in (content_of, lambda file: list_files(file.path, ENDINGS)):
        http.faults = [status] * 2
        with pytest.raises(InputError, match="access is refused"):
            read_or_list(file)
        http.faults.clear()
    with open_file(file) as stream:
        http.faults = [status]
        with pytest.raises(InputError, match="access is refused"):
            stream.read(1)
    assert delays == []


def test_a_server_without_sizes_or_ranges_is_refused_and_nothing_is_downloaded(http):
    http.files["/b.jsonl"] = CONTENT * 60
    file = one(f"{http.url}/b.jsonl")
    http.with_ranges = False
    with pytest.raises(BadText, match="its server ignores ranges; download it"):
        content_of(file, 2**20)
    with pytest.raises(BadText, match="its server ignores ranges; download it"):
        content_of(file)
    assert READ_TOTALS["bytes"] <= 2**16
    http.with_size = False
    assert "does not say its size, or cannot send parts of it; download it" in problem(f"{http.url}/b.jsonl")


def test_a_file_in_memory_is_one_like_others():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/corpus/deep/a.jsonl", CONTENT)
    try:
        file = one("memory://corpus")
        assert (file.path, file.name, file.size) == ("memory:///corpus/deep/a.jsonl", "deep/a.jsonl", len(CONTENT))
        assert content_of(file) == CONTENT
        memory.pipe_file("/corpus/deep/a.jsonl", CONTENT[1:])
        with pytest.raises(BadText, match="has changed"):
            content_of(file)
    finally:
        memory.rm("/corpus", recursive=True)


def test_a_file_that_becomes_shorter_while_it_is_read_is_not_taken_for_whole():
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe_file("/corpus/a.jsonl", CONTENT)
    try:
        with open_file(one("memory://corpus")) as stream:
            stream.read(10)
            memory.store["/corpus/a.jsonl"].truncate(len(CONTENT) - 1000)
            with pytest.raises(BadText, match="has changed"):
                stream.read()
    finally:
        memory.rm("/corpus", recursive=True)


def test_protocols_that_are_unknown_or_need_a_package_are_said(monkeypatch):
    assert "Protocol not known: nonsense" in problem("nonsense://a/b.jsonl")
    assert "chained" in problem("s3://a::b.jsonl")
    fsspec = pytest.importorskip("fsspec")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert problem("gs://a/b.jsonl").endswith("a package that reads gs:// is missing: pip install gcsfs")
    assert problem("gdrive://a/b.jsonl").endswith("is missing: Please install gcsfs to access Google Storage")


@pytest.mark.parametrize("characters", [100, 4000, 20_000])
def test_small_chunks_of_a_remote_file_are_read_nearly_once(characters: int, http: Server):
    content = b"".join(b'{"text": "%s"}\n' % (b"x" * (characters + i % 99)) for i in range(2**22 // characters))
    http.files["/a.jsonl"] = content
    corpus = open_corpus(f"{http.url}/a.jsonl", DataConfig(num_streams=4, validation_fraction=0.0))
    assert len(corpus.chunks) == -(-len(content) // 2**16)
    READ_TOTALS.clear()
    documents = [document for chunk in corpus.chunks for document in corpus.documents(chunk)]
    assert len(documents) == 2**22 // characters
    # A line that reaches into the next chunk takes one range or two, and is read there again.
    assert READ_TOTALS["bytes"] < (1.2 if characters < 2**13 else 2) * len(content)


@pytest.mark.parametrize("server", ["s3", "http"])
def test_streams_are_those_of_local_files_and_resume_with_little_read(server, request, tmp_path: Path):
    store = request.getfixturevalue(server)
    content = b"".join(CONTENT.replace(b"document", b"text %04d" % i) for i in range(10))
    (tmp_path / "large.jsonl").write_bytes(content)
    if server == "s3":
        store.put_object(Bucket="corpus", Key="large.jsonl", Body=content)
    else:
        store.files["/large.jsonl"] = content
    config = DataConfig(segment_length=2000, num_streams=2, chunk_bytes=2**17, shuffle_window=2**17)

    def rows(where: str, number: int, begin: np.ndarray | None = None) -> tuple[list[list[Any]], np.ndarray]:
        mixture = open_mixture(dataclasses.replace(config, corpus=where), lambda: "")
        positions = initial_positions(mixture, 2) if begin is None else begin
        streams = open_streams(mixture, ByteTokenizer(), tokenize, 0, range(2), positions)
        found = []
        for step in range(number):
            if server == "http":
                # Every step's first range breaks off once.
                store.faults = ["drop"] if step else []
            for stream in streams.values():
                found.append([(part.pairs.document.text, part.begin, part.end) for part in stream.take(step)[1]])
        if server == "http":
            store.faults = []
        return found, np.stack([stream.positions for stream in streams.values()])

    where = "s3://corpus/large.jsonl" if server == "s3" else f"{store.url}/large.jsonl"
    expected, _ = rows(str(tmp_path / "large.jsonl"), 500)
    found, after = rows(where, 470)
    assert found == expected[: 2 * 470]
    READ_TOTALS.clear()
    rest, _ = rows(where, 30, after)
    assert rest == expected[2 * 470 :]
    # Two windows a stream at most, with the fields around the texts.
    assert 2**17 < READ_TOTALS["bytes"] < 2 * 2 * 1.5 * 2**17 < len(content) / 5
