"""`fetch-encoder` against a server that breaks off, lies and changes its mind."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from models.encoders import ENCODERS
from pipeline.errors import StorageFault, UserError
from pipeline.tools.fetch import FetchOptions, _Redirects, checkpoint_table, fetch_encoder
from pipeline.tools.known_checkpoints import CHECKPOINTS, KnownCheckpoint, RemoteFile
from tests.helpers.command import cantor

DATA = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@dataclass
class Behaviour:
    """The behaviour of the server. breaks_at: bytes of an answer after which it hangs up."""

    data: bytes = DATA
    etag: str | None = '"v1"'
    last_modified: str | None = None
    statuses: list[int] = field(default_factory=list)  # answered first, one a request
    headers: dict[str, str] = field(default_factory=dict)
    breaks_at: int | None = None
    ranges: bool = True
    if_range: bool = True
    announced: int | None = None  # Content-Length, if it lies
    chunked: bool = False
    after_each: Callable[[Behaviour], None] | None = None
    asked: list[dict[str, str]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        does = self.server.does
        does.asked.append({k.lower(): v for k, v in self.headers.items()})
        self.close_connection = True
        if does.statuses:
            self.answer_status(does.statuses.pop(0))
        else:
            self.answer_file(does)
        if does.after_each is not None:
            does.after_each(does)

    def answer_status(self, status: int) -> None:
        self.send_response(status)
        for key, value in self.server.does.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer_file(self, does: Behaviour) -> None:
        start = 0
        asked = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, does.etag, does.last_modified)
        if does.ranges and asked is not None and (same or not does.if_range):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(does.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(does.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            end = len(does.data)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        else:
            self.send_response(200)
        body = does.data[start:]
        for key, value in (("ETag", does.etag), ("Last-Modified", does.last_modified)):
            if value is not None:
                self.send_header(key, value)
        for key, value in does.headers.items():
            self.send_header(key, value)
        if does.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            length = does.announced if does.announced is not None else len(body)
            self.send_header("Content-Length", str(length))
        self.end_headers()
        body = body[: does.breaks_at]
        if does.chunked:
            for i in range(0, len(body), 100_000):
                piece = body[i : i + 100_000]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if does.breaks_at is None:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    does: Behaviour

    def handle_error(self, *_: object) -> None:
        """A client that hung up is no news."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.does = Behaviour()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server: Server, path: str = "/net.pt", scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.server_port}{path}"


@pytest.fixture
def known(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a checkpoint 'net' at the server into the table."""

    def add(size: int | None = len(DATA), sha256: str | None = SHA256, **more: Any) -> None:
        file = RemoteFile("net.pt", more.get("url", address(server)), size, sha256)
        monkeypatch.setitem(CHECKPOINTS, "net", KnownCheckpoint((file,), ("hubertsoft",)))

    add()
    return add


def fetch(to: Path, **options: Any) -> Path:
    quick = {"to": to, "first_pause_s": 0.001, "timeout_s": 5.0, "retries": 3, **options}
    return fetch_encoder("net", FetchOptions(**quick), Console(file=io.StringIO()))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


pytestmark = pytest.mark.usefixtures("known")


def test_a_file_arrives(server: Server, tmp_path: Path) -> None:
    assert fetch(tmp_path / "new") == tmp_path / "new" / "net.pt"
    assert (tmp_path / "new" / "net.pt").read_bytes() == DATA
    assert files(tmp_path / "new") == ["net.pt"]
    assert server.does.asked[0]["accept-encoding"] == "identity"
    fetch(tmp_path / "new")  # it is there: nothing is asked
    assert len(server.does.asked) == 1


def test_broken_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.does.breaks_at = 700_000
    fetch(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == DATA
    ranges = [asked.get("range") for asked in server.does.asked]
    assert ranges == [None, *(f"bytes={700_000 * i}-" for i in (1, 2, 3, 4))]
    assert all(asked["if-range"] == '"v1"' for asked in server.does.asked[1:])
    assert files(tmp_path) == ["net.pt"]


def test_a_later_run_goes_on(server: Server, tmp_path: Path) -> None:
    def give_up(does: Behaviour) -> None:
        does.statuses = [503] * 20

    server.does.breaks_at, server.does.after_each = 1_000_000, give_up
    with pytest.raises(UserError, match=r"503 .* same command again to resume after 1000000 bytes"):
        fetch(tmp_path)
    assert files(tmp_path) == ["net.pt.part", "net.pt.part.json"]
    server.does = Behaviour()
    fetch(tmp_path)
    assert server.does.asked[0]["range"] == "bytes=1000000-"
    assert (tmp_path / "net.pt").read_bytes() == DATA and files(tmp_path) == ["net.pt"]


def test_a_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net.pt.part").write_bytes(DATA[:1_000_000])
    server.does.ranges = False
    fetch(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == DATA


def test_a_server_that_ignores_ranges_and_always_breaks_ends(
    server: Server, tmp_path: Path
) -> None:
    server.does.ranges, server.does.breaks_at = False, 500_000
    with pytest.raises(UserError, match=r"broke at 500000 of 3000000 bytes \(4 times"):
        fetch(tmp_path)
    assert len(server.does.asked) == 5


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_in_between_is_fetched_anew(
    server: Server, tmp_path: Path, known: Callable[..., None], if_range: bool
) -> None:
    other = bytes(reversed(DATA))
    known(sha256=hashlib.sha256(other).hexdigest())

    def change(does: Behaviour) -> None:
        does.data, does.etag, does.breaks_at = other, '"v2"', None

    server.does = Behaviour(breaks_at=900_000, after_each=change, if_range=if_range)
    fetch(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == other


def test_a_change_that_nothing_tells_is_found_by_the_hash(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net.pt.part").write_bytes(bytes(1_000_000))
    server.does.etag = None
    fetch(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == DATA


def test_without_hash_and_version_nothing_is_resumed(
    server: Server, tmp_path: Path, known: Callable[..., None]
) -> None:
    known(sha256=None)
    (tmp_path / "net.pt.part").write_bytes(bytes(1_000_000))
    server.does.etag = None
    fetch(tmp_path, accept_first=True)
    assert "range" not in server.does.asked[0]
    assert (tmp_path / "net.pt").read_bytes() == DATA


def test_a_weak_etag_is_no_version_and_a_date_is(server: Server, tmp_path: Path) -> None:
    server.does.etag, server.does.last_modified = 'W/"v1"', "Wed, 21 Oct 2015 07:28:00 GMT"
    server.does.breaks_at = 2_000_000
    fetch(tmp_path)
    assert server.does.asked[1]["if-range"] == "Wed, 21 Oct 2015 07:28:00 GMT"


def test_a_wrong_hash_is_not_installed(server: Server, tmp_path: Path) -> None:
    server.does.data = DATA[:-1] + b"x"
    wrong = hashlib.sha256(server.does.data).hexdigest()
    with pytest.raises(UserError, match=f"its SHA-256 is {wrong}, not {SHA256}"):
        fetch(tmp_path)
    assert files(tmp_path) == []


def test_sizes_that_are_not_those_of_the_table(server: Server, tmp_path: Path) -> None:
    server.does.data = DATA[:-1]
    with pytest.raises(UserError, match=r"has 2999999 bytes; net\.pt should have 3000000"):
        fetch(tmp_path)
    server.does.data = DATA + b"x"
    with pytest.raises(UserError, match=r"has 3000001 bytes; net\.pt should have 3000000"):
        fetch(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_server_that_announces_more_than_it_sends(
    server: Server, tmp_path: Path, known: Callable[..., None], size: int | None
) -> None:
    known(size=size)
    server.does.announced, server.does.ranges, server.does.data = 3_000_000, False, DATA[:-10]
    with pytest.raises(UserError, match="broke at 2999990 of 3000000 bytes"):
        fetch(tmp_path)
    assert "net.pt" not in files(tmp_path)


def test_a_server_that_sends_more_than_it_announces(
    server: Server, tmp_path: Path, known: Callable[..., None]
) -> None:
    known(size=None, sha256=None)
    server.does.announced = 2_000_000
    with pytest.raises(UserError, match="sends more than the expected 2000000 bytes"):
        fetch(tmp_path, accept_first=True)
    assert files(tmp_path) == []


def test_chunks_have_no_length_to_lie_about(
    server: Server, tmp_path: Path, known: Callable[..., None]
) -> None:
    server.does.chunked = True
    fetch(tmp_path / "whole")
    server.does.breaks_at = 1_000_000
    with pytest.raises(UserError, match="connection broke"):
        fetch(tmp_path / "broken", retries=1)
    server.does = Behaviour(chunked=True, data=DATA + b"more")
    with pytest.raises(UserError, match="sends more than the expected 3000000 bytes"):
        fetch(tmp_path / "long")
    assert files(tmp_path / "long") == []


def test_a_part_that_is_whole_or_too_long(server: Server, tmp_path: Path) -> None:
    (tmp_path / "net.pt.part").write_bytes(DATA)
    fetch(tmp_path)
    assert len(server.does.asked) == 1 and files(tmp_path) == ["net.pt"]
    (tmp_path / "net.pt").unlink()
    (tmp_path / "net.pt.part").write_bytes(DATA + b"and more")
    fetch(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == DATA


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.does.statuses, server.does.headers = [status] * 2, {"Retry-After": "0"}
    fetch(tmp_path)
    assert len(server.does.asked) == 3
    server.does.statuses = [status] * 20
    with pytest.raises(UserError, match=f"the server answers {status}"):
        fetch(tmp_path / "again")
    assert files(tmp_path / "again") == []


@pytest.mark.parametrize("status", [401, 403, 404, 410, 204])
def test_what_will_not_pass_is_said_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.does.statuses = [status] * 2
    with pytest.raises(UserError, match=str(status)):
        fetch(tmp_path)
    assert len(server.does.asked) == 1 and files(tmp_path) == []


def test_a_web_page_is_not_a_checkpoint(server: Server, tmp_path: Path) -> None:
    server.does.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(UserError, match="sends a web page instead of the file"):
        fetch(tmp_path)
    server.does.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(UserError, match="Content-Encoding, gzip"):
        fetch(tmp_path)
    assert files(tmp_path) == []


def test_nobody_is_there(server: Server, tmp_path: Path, known: Callable[..., None]) -> None:
    known(url="http://127.0.0.1:1/net.pt")
    with pytest.raises(UserError, match=r"could not be fetched: no connection: .*refused"):
        fetch(tmp_path)


def test_redirects_are_followed_but_not_out_of_http(server: Server, tmp_path: Path) -> None:
    server.does.statuses, server.does.headers = [302], {"Location": "/elsewhere"}
    fetch(tmp_path)
    for location in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
        server.does.statuses, server.does.headers = [302], {"Location": location}
        with pytest.raises(UserError, match=r"is not an http\(s\) address|302"):
            fetch(tmp_path / "never")
    server.does.statuses, server.does.headers = [302] * 30, {"Location": "/round"}
    with pytest.raises(UserError, match="302"):
        fetch(tmp_path / "never")
    assert files(tmp_path / "never") == []


def test_https_is_not_left() -> None:
    request = urllib.request.Request("https://a.example/net.pt")
    handler = _Redirects()
    with pytest.raises(UserError, match=r"redirects to http://b\.example/x, which is not https"):
        handler.redirect_request(request, io.BytesIO(), 302, "", {}, "http://b.example/x")
    followed = handler.redirect_request(request, io.BytesIO(), 302, "", {}, "//b.example/x")
    assert followed is not None and followed.full_url == "https://b.example/x"


def test_a_hash_that_nobody_states_is_given_or_accepted_and_then_held(
    server: Server, tmp_path: Path, known: Callable[..., None]
) -> None:
    known(sha256=None, size=None)
    with pytest.raises(UserError, match="pass --sha256 HEX, or --accept-first"):
        fetch(tmp_path)
    assert server.does.asked == []
    fetch(tmp_path / "given", sha256=SHA256.upper())
    with pytest.raises(UserError, match="the download was deleted"):
        fetch(tmp_path / "wrong", sha256="ab" * 32)
    fetch(tmp_path, accept_first=True)
    record = tmp_path / "net.pt.sha256.json"
    assert json.loads(record.read_text())["sha256"] == SHA256
    (tmp_path / "net.pt").unlink()
    server.does.data = bytes(reversed(DATA))
    with pytest.raises(UserError, match=f"not {SHA256}; the download"):  # --accept-first or not
        fetch(tmp_path, accept_first=True)
    assert files(tmp_path) == ["given", "net.pt.sha256.json", "wrong"]
    server.does.data = DATA
    fetch(tmp_path)
    record.write_text("{}")
    with pytest.raises(UserError, match=r"net\.pt\.sha256\.json is damaged"):
        fetch(tmp_path)


def test_a_file_that_is_there_is_checked(tmp_path: Path, known: Callable[..., None]) -> None:
    (tmp_path / "net.pt").write_bytes(b"something else")
    with pytest.raises(UserError, match=f"not {SHA256}; remove it"):
        fetch(tmp_path)
    known(sha256=None)
    with pytest.raises(UserError, match="pass --accept-first to trust it"):
        fetch(tmp_path)
    fetch(tmp_path, accept_first=True)
    assert files(tmp_path) == ["net.pt", "net.pt.sha256.json"]


def test_another_address_is_held_to_the_same_hash(
    server: Server, tmp_path: Path, known: Callable[..., None]
) -> None:
    known(url=None)
    with pytest.raises(UserError, match=r"net\.pt has no public address; give one"):
        fetch(tmp_path)
    fetch(tmp_path, url=address(server, "/mirror"))
    with pytest.raises(UserError, match="the download was deleted"):
        server.does.data = bytes(3_000_000)
        fetch(tmp_path / "other", url=address(server, "/mirror"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "file:///etc/passwd"}, r"is not an http\(s\) address"),
        ({"url": "ftp://host/x"}, r"is not an http\(s\) address"),
        ({"url": "http:///x"}, r"is not an http\(s\) address"),
        ({"url": "net.pt"}, r"is not an http\(s\) address"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
        ({"sha256": "ab" * 32}, f"but net.pt has the published one {SHA256}"),
    ],
)
def test_options_are_checked(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        fetch(tmp_path, **options)


def test_a_full_disk_is_named_and_the_part_is_kept(server: Server, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    with pytest.raises(StorageFault, match=r"part needs 3 MB more, but only 2 MB are free"):
        fetch(small_disk)
    server.does.chunked = True  # no size is announced, and none is known
    CHECKPOINTS["net"] = KnownCheckpoint((RemoteFile("net.pt", address(server), None, SHA256),), ())
    with pytest.raises(StorageFault, match=r"no space left at .*net\.pt\.part; free some"):
        fetch(small_disk)
    assert (small_disk / "net.pt.part").stat().st_size > 1_000_000
    (small_disk / "ballast").unlink()
    server.does.chunked = False
    fetch(small_disk)
    assert "range" in server.does.asked[-1]
    assert (small_disk / "net.pt").read_bytes() == DATA


def test_two_at_once_do_not_write_into_one_file(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "net.pt.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being fetched by another process"):
            fetch(tmp_path)


def test_several_files_make_a_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = tuple(RemoteFile(n, address(server, n), len(DATA), SHA256) for n in ("/a", "/b"))
    pair = tuple(RemoteFile(f.name[1:], f.url, f.size, f.sha256) for f in pair)
    monkeypatch.setitem(CHECKPOINTS, "net", KnownCheckpoint(pair, ()))
    assert fetch(tmp_path) == tmp_path / "net"
    assert files(tmp_path / "net") == ["a", "b"]
    with pytest.raises(UserError, match="has several files"):
        fetch(tmp_path, url=address(server))


def test_the_table_is_sound() -> None:
    for known in CHECKPOINTS.values():
        for file in known.files:
            assert file.url is None or file.url.startswith(("https://", "http://127.0.0.1"))
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
            assert "/" not in file.name
            if "whisper/models" in (file.url or ""):
                assert file.url.split("/")[-2] == file.sha256  # type: ignore[union-attr]


def test_every_encoder_with_weights_can_be_fetched() -> None:
    served = {encoder for known in CHECKPOINTS.values() for encoder in known.encoders}
    assert set(ENCODERS) - {"mfcc", "log-mel"} == served


def test_the_command(server: Server, tmp_path: Path) -> None:
    listed = cantor("fetch-encoder", "--list")
    assert "whisper-ppg-large" in listed and "--accept-first" in listed
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(checkpoint_table(), highlight=False)
    names = {line.split(" ")[0] for line in narrow.getvalue().splitlines()}
    assert names >= set(CHECKPOINTS)
    assert "a file; name a folder" in cantor(
        "fetch-encoder", "hubertsoft", "--to", Path(__file__), status=2
    )
    assert "did you mean 'hubertsoft'" in cantor("fetch-encoder", "hubersoft", status=2)
    assert "with these checkpoints: contentvec," in cantor(
        "fetch-encoder", "contentvec768l12", status=2
    )
    options = ("--to", tmp_path, "--url", address(server), "--sha256", SHA256)
    output = cantor("fetch-encoder", "hubertsoft", *options)
    assert f"encoder.name=hubertsoft encoder.checkpoint={tmp_path}" in output.replace("\n", "")
    assert (tmp_path / "hubert-soft-0d54a1f4.pt").read_bytes() == DATA
