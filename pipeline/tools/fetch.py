"""`fetch-encoder`: download a checkpoint and verify it. No other command uses the network.

A download is NAME.part, with the version of the remote file in NAME.part.json, and is renamed once
its SHA-256 is right. NAME.sha256.json holds a SHA-256 that was accepted with --accept-first.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.message import Message
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from rich.console import Console
from rich.table import Column, Table

from models.input_file import read_json
from pipeline.cluster.bar import show_bar
from pipeline.errors import StorageFault, UserError
from pipeline.storage.atomic import storage_fault
from pipeline.tools.known_checkpoints import CHECKPOINTS, KnownCheckpoint, RemoteFile

_BLOCK = 1 << 20
_LONGEST_PAUSE_S = 60.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses worth a retry
_SPILL_S = 0.2  # how long to wait for bytes beyond the announced length


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Options of `fetch-encoder`.

    accept_first: trust the first download of a file without a published SHA-256, and check later
    ones against it. retries: attempts in a row that bring no new bytes.
    """

    to: Path = Path("checkpoints")
    sha256: str | None = None
    accept_first: bool = False
    url: str | None = None
    retries: int = 6
    first_pause_s: float = 1.0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.sha256 is not None and not _is_sha256(self.sha256):
            raise UserError(f"--sha256 must be 64 hexadecimal digits, not '{self.sha256}'")
        if self.url is not None:
            _check_scheme(self.url)


class _Broken(Exception):
    """A transient failure of connection or server. wait_s: delay that the server asks for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _StartOver(Exception):
    """The partial download is not the start of the server's present file."""


def fetch_encoder(name: str, options: FetchOptions, console: Console) -> Path:
    """Fetch a known checkpoint into `options.to`, and return its file, or its folder of files.

    After a fault NAME.part stays for the next attempt, unless its content is wrong.
    Raises: UserError: when the download fails or has a wrong SHA-256; StorageFault: when the disk
    is full.
    """
    checkpoint = _known(name)
    several = len(checkpoint.files) > 1
    if several and (options.url is not None or options.sha256 is not None):
        raise UserError(f"{name} has several files; --url and --sha256 apply to one file only")
    if options.to.exists() and not options.to.is_dir():
        raise UserError(f"--to {options.to} is a file; name a folder")
    folder = options.to / name if several else options.to
    for file in checkpoint.files:
        _fetch(replace(file, url=options.url or file.url), folder, options, console)
    return folder if several else folder / checkpoint.files[0].name


def _known(name: str) -> KnownCheckpoint:
    if name in CHECKPOINTS:
        return CHECKPOINTS[name]
    by_encoder = [key for key, known in CHECKPOINTS.items() if name in known.encoders]
    if by_encoder:
        raise UserError(
            f"'{name}' is an encoder with these checkpoints: {', '.join(by_encoder)}; name one"
        )
    close = difflib.get_close_matches(name, CHECKPOINTS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "--list prints the names"
    raise UserError(f"'{name}' is not a known checkpoint; {hint}")


def _fetch(file: RemoteFile, folder: Path, options: FetchOptions, console: Console) -> None:
    target = folder / file.name
    record = folder / f"{file.name}.sha256.json"
    expected = _expected(file, record, options)
    if target.exists():
        _check_present(target, expected, record, options)
        console.print(f"{target} exists and is intact", markup=False, soft_wrap=True)
        return
    if file.url is None:
        raise UserError(f"{file.name} has no public address; give one with --url")
    if expected is None and not options.accept_first:
        raise UserError(
            f"no SHA-256 is published for {file.name}; pass --sha256 HEX, or --accept-first to "
            "trust this download and check later ones against it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part"
    with _only_one(part) as out:
        resumed = part.stat().st_size > 0
        _download(file, part, out, expected, options, console)
        actual = _hash(part)
        if resumed and expected not in (None, actual):  # the first part may be of another file
            _empty(out, part)
            _download(file, part, out, expected, options, console)
            actual = _hash(part)
        if expected is not None and actual != expected:
            _forget(part)
            raise UserError(
                f"{file.url} is not the expected file: its SHA-256 is {actual}, not {expected}; "
                "the download was deleted"
            )
        if expected is None:
            _write_record(record, file.url, actual, part.stat().st_size)
            console.print(
                f"accepted with SHA-256 {actual}, recorded in {record}",
                markup=False,
                soft_wrap=True,
            )
        os.fsync(out.fileno())
        os.replace(part, target)
        _forget(part)
        _sync_folder(folder)


def _expected(file: RemoteFile, record: Path, options: FetchOptions) -> str | None:
    """Return the SHA-256 that the file must have: the user's, the table's, or an accepted one."""
    given = options.sha256.lower() if options.sha256 is not None else None
    if given is not None and options.url is None and file.sha256 not in (None, given):
        raise UserError(f"--sha256 is {given}, but {file.name} has the published one {file.sha256}")
    return given or file.sha256 or _read_record(record)


def _check_present(target: Path, expected: str | None, record: Path, options: FetchOptions) -> None:
    actual = _hash(target)
    if expected is None:
        if not options.accept_first:
            raise UserError(
                f"{target} exists, but no SHA-256 is published for it; pass --accept-first to "
                f"trust it (SHA-256 {actual}) and check later downloads against it"
            )
        _write_record(record, None, actual, target.stat().st_size)
    elif actual != expected:
        raise UserError(
            f"{target} exists, but its SHA-256 is {actual}, not {expected}; remove it to fetch it "
            "again"
        )


@contextlib.contextmanager
def _only_one(part: Path) -> Iterator[BinaryIO]:
    """Open `part` for writing, locked against other processes."""
    with part.open("ab+") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{part} is being fetched by another process") from error
        try:
            yield out
        finally:
            if part.exists() and part.stat().st_size == 0:
                _forget(part)


def _download(
    file: RemoteFile,
    part: Path,
    out: BinaryIO,
    expected: str | None,
    options: FetchOptions,
    console: Console,
) -> None:
    """Complete `part`, reconnecting after transient failures."""
    assert file.url is not None
    furthest, failures = 0, 0
    have = part.stat().st_size
    with show_bar(console, file.name, file.size, have, in_bytes=True) as advance:
        while True:
            try:
                _connect_and_read(file, part, out, expected is not None, options, advance)
                return
            except _StartOver:
                advance(-part.stat().st_size)
                _empty(out, part)
                broken = _Broken("the file changed during the download")
            except _Broken as error:
                broken = error
            have = part.stat().st_size
            failures = 0 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if failures > options.retries:
                raise UserError(
                    f"{file.url} could not be fetched: {broken} ({failures} times in a row); run "
                    f"the same command again to resume after {have} bytes"
                )
            pause_s = options.first_pause_s * 2 ** max(0, failures - 1)
            time.sleep(min(max(pause_s, broken.wait_s), _LONGEST_PAUSE_S))


def _connect_and_read(
    file: RemoteFile,
    part: Path,
    out: BinaryIO,
    hash_is_known: bool,
    options: FetchOptions,
    advance: Callable[[int], None],
) -> None:
    """Append the missing bytes to `part` over one connection; return when it is complete."""
    assert file.url is not None
    version = _read_version(part, file.url)
    have = part.stat().st_size
    if have and version is None and not hash_is_known:
        advance(-have)
        _empty(out, part)  # without version or hash, a changed file would go unnoticed
        have = 0
    headers = {"User-Agent": "cantor", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version is not None:
            headers["If-Range"] = version
    with _open(urllib.request.Request(file.url, headers=headers), options) as response:
        if response.status == 416:
            if _total(response.headers) == have and have:
                return  # it is complete already
            raise _StartOver
        _refuse_other_content(file.url, response)
        now = _version(response.headers)
        if response.status == 206:
            if _range_start(response.headers) != have or version not in (None, now):
                raise _StartOver
        else:
            advance(-have)
            _empty(out, part)
            have = 0
        total = _total(response.headers)
        _check_size(file, total)
        _check_room(part, (total or file.size or have) - have)
        _write_version(part, file.url, now)
        got = have
        for block in _blocks(response):
            got += len(block)
            limit = total if total is not None else file.size
            if limit is not None and got > limit:
                _forget(part, out)
                raise UserError(f"{file.url} sends more than the expected {limit} bytes")
            _append(out, block)
            advance(len(block))
        whole = total if total is not None else file.size
        if whole is not None and got < whole:
            raise _Broken(f"the connection broke at {got} of {whole} bytes")


def _open(request: urllib.request.Request, options: FetchOptions) -> Any:
    """Return the response: 200, 206 or 416.

    Raises: _Broken: when a retry may help; UserError: when it will not.
    """
    opener = urllib.request.build_opener(_Redirects)
    try:
        response = opener.open(request, timeout=options.timeout_s)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error  # it has status, headers and close too
        with error:
            if error.code in _TRANSIENT:
                wait = error.headers.get("Retry-After", "")
                raise _Broken(
                    f"the server answers {error.code} {error.reason}",
                    float(wait) if wait.isdecimal() else 0.0,
                ) from error
            raise UserError(
                f"{request.full_url} cannot be fetched: the server answers {error.code} "
                f"{error.reason}"
            ) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{request.full_url} has an invalid certificate: {error.reason}"
            ) from error
        raise _Broken(f"no connection: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"no connection: {error!r}") from error
    if response.status not in (200, 206):
        response.close()
        raise UserError(f"{request.full_url} answers {response.status}, not a file")
    return response


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows redirects, but never from https to anything else."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        target = urljoin(req.full_url, newurl)
        if urlsplit(req.full_url).scheme == "https" and urlsplit(target).scheme != "https":
            raise UserError(
                f"{req.full_url} redirects to {target}, which is not https; give another --url"
            )
        _check_scheme(target)
        return super().redirect_request(req, fp, code, msg, headers, target)


def _blocks(response: Any) -> Iterator[bytes]:
    """Yield all bytes that the server sends, including any beyond the announced length."""
    source: Any = response if response.chunked or response.length is None else response.fp
    left = response.length if source is not response else None
    try:
        while left is None or left > 0:
            block = source.read(_BLOCK if left is None else min(_BLOCK, left))
            if not block:
                return
            left = None if left is None else left - len(block)
            yield block
    except http.client.IncompleteRead as error:
        raise _Broken(f"the connection broke ({error})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({error!r})") from error
    with contextlib.suppress(OSError, AttributeError):
        source.raw._sock.settimeout(_SPILL_S)  # the only way to see bytes beyond the length
        if extra := source.read1(1):
            yield extra


def _refuse_other_content(url: str, response: Any) -> None:
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else ""
    if kind in ("text/html", "application/xhtml+xml"):
        raise UserError(
            f"{url} sends a web page instead of the file (perhaps a login or consent form); "
            "download it with a browser, or give another --url"
        )
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise UserError(
            f"{url} sends an unsupported Content-Encoding, {coding}; give another --url"
        )


def _check_size(file: RemoteFile, total: int | None) -> None:
    if total is not None and file.size is not None and total != file.size:
        raise UserError(f"{file.url} has {total} bytes; {file.name} should have {file.size}")


def _check_room(part: Path, wanted: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if wanted > free:
        raise StorageFault(
            f"{part} needs {wanted / 1e6:.0f} MB more, but only {free / 1e6:.0f} MB are free; free "
            "some space"
        )


def _total(headers: Message) -> int | None:
    """Return the size of the whole file according to the server."""
    full = headers.get("Content-Range", "").rpartition("/")[2]
    if full:
        return int(full) if full.isdecimal() else None
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _range_start(headers: Message) -> int | None:
    start = headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdecimal() else None


def _version(headers: Message) -> str | None:
    """Return a value for If-Range: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag")
    if etag is not None and not etag.startswith("W/"):
        return str(etag)
    return headers.get("Last-Modified")


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_version(part: Path, url: str) -> str | None:
    try:
        stated = read_json(_version_file(part))
        return str(stated["version"]) if stated["url"] == url and stated["version"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_version(part: Path, url: str, version: str | None) -> None:
    _version_file(part).write_text(json.dumps({"url": url, "version": version}), "utf-8")


def _append(out: BinaryIO, block: bytes) -> None:
    try:
        out.write(block)
        out.flush()
    except OSError as error:
        error.filename = error.filename or out.name
        raise storage_fault(error) from error


def _empty(out: BinaryIO, part: Path) -> None:
    out.truncate(0)
    _version_file(part).unlink(missing_ok=True)


def _forget(part: Path, out: BinaryIO | None = None) -> None:
    if out is not None:
        out.truncate(0)
    part.unlink(missing_ok=True)
    _version_file(part).unlink(missing_ok=True)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UserError(f"'{url}' is not an http(s) address")


def _read_record(record: Path) -> str | None:
    try:
        sha256 = read_json(record)["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged: {error}; remove it") from error
    if not isinstance(sha256, str) or not _is_sha256(sha256):
        raise UserError(f"{record} has no SHA-256; remove it")
    return sha256


def _write_record(record: Path, url: str | None, sha256: str, size: int) -> None:
    text = json.dumps({"sha256": sha256, "size": size, "url": url}, indent=2) + "\n"
    temporary = record.with_name(f".{record.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, record)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not support it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_table() -> Table:
    """Build the table of known checkpoints with size, hash and encoders."""
    table = Table(
        Column("name", no_wrap=True),  # never cut, because users type it
        Column("file", overflow="fold"),
        "MB",
        "SHA-256",
        "encoders",
        box=None,
        pad_edge=False,
    )
    for name, known in CHECKPOINTS.items():
        for file in known.files:
            table.add_row(
                name,
                file.name,
                f"{file.size / 1e6:.1f}" if file.size is not None else "?",
                file.sha256[:12] + "…" if file.sha256 is not None else "--accept-first",
                ", ".join(known.encoders),
            )
            name = ""
    return table


def usage_line(name: str, path: Path) -> str:
    """Return the setting that uses the checkpoint."""
    encoders = CHECKPOINTS[name].encoders
    use = f"encoder.name={encoders[-1]} encoder.checkpoint" if encoders else "xvector.checkpoint"
    return f"use it with {use}={path}"
