"""Lets other processes read a chDB folder while this one has it: ClickHouse's HTTP interface on loopback, read-only.

A chDB folder belongs to one process: a collector, or one that is there to be read from while no collector has the
folder (`clickhouse_process`). It answers queries here, on a free port, and leaves port and password in the folder, in
a file for its own user alone; `find` reads them, if their writer still has the folder. Clients are
clickhouse-connect's, unchanged.

What is asked cannot harm the collector: each query has a handle of its own on which `readonly = 1` is set after the
limits, so that ClickHouse itself refuses to write, to reach for files and networks, and to change a setting. What it
would not refuse is refused by `_refusal` (docs/adr/0084).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import fcntl
import hmac
import http.client
import io
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa

USER = "fp8scope"
OFFER = "reading.json"
QUERIES = 4  # at a time
WAIT_S = 20.0  # of one more, for its turn
DRAIN_S = 1.0  # that a query has when the collector ends
IDLE_S = 60.0  # without a byte from or to a client
_THREADS_ALONE = 2  # of a query, where there is no ingest beside it
BODY_BYTES = 1 << 20
ANSWER_BYTES = 64 << 20  # of a format that has to be complete before it is sent
ROWS_AT_ONCE = 64  # of 256 values in each field: of each part that a query reads there is a block in memory
INTERPRETED = {  # a compiler and what it compiles are 35 MiB, and answers were not slower without
    "compile_expressions": 0,
    "compile_aggregate_expressions": 0,
    "compile_sort_description": 0,
}
LIMITS = INTERPRETED | {
    "max_threads": 1,
    "max_block_size": ROWS_AT_ONCE,
    "max_read_buffer_size": 1 << 17,  # of each column of each part: a megabyte otherwise
    "query_plan_execute_functions_after_sorting": 0,  # it would sort whole arrays of which one value is wanted
    "max_memory_usage": 256 << 20,
    "max_bytes_before_external_sort": 128 << 20,
    "max_bytes_before_external_group_by": 128 << 20,
    "max_execution_time": 600,
    "readonly": 1,
}
_LEAVE = "/leave"
_COMMENT = "fp8scope reading"
_STREAMED = ("Native", "ArrowStream")  # chDB gives other formats complete in each block, and no way to join these
_TRANSPORT = ("database", "session_id", "query_id", "wait_end_of_query", "client_protocol_version", "default_format")
_STATUS = {"516": 403, "202": 503}
_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
_ASKS = re.compile(r"\s*(SELECT|WITH|DESCRIBE|DESC)\b", re.IGNORECASE)
_REACHES_OUT = re.compile(r"outfile|\b(file|python)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Offer:
    """Where the process that has a folder answers."""

    pid: int
    port: int
    password: str
    gives_way: bool = False  # whether it leaves the folder when it is told to

    def tell_to_leave(self) -> None:
        """Lets whoever wants to change something have the folder, soon."""
        with contextlib.suppress(OSError, http.client.HTTPException):  # it has left already
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DRAIN_S)
            connection.request("POST", _LEAVE, headers={"Authorization": _authorization(self.password)})
            connection.getresponse().read()
            connection.close()


def holder(folder: Path) -> int | None:
    """The process that has the folder open, None: nobody. Costs a few microseconds.

    Raises:
        PermissionError: the folder is another user's.
    """
    try:
        with (folder / "status").open() as file:
            try:
                fcntl.flock(
                    file, fcntl.LOCK_SH | fcntl.LOCK_NB
                )  # chDB has it exclusively, and the kernel takes it away
            except BlockingIOError:
                found = re.search(r"PID: (\d+)", file.read())
                return int(found[1]) if found else 0
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def find(folder: Path, pid: int) -> Offer | None:
    """What process `pid`, which has the folder, left in it; None: nothing, or what is there is a dead process's.

    Raises:
        PermissionError: the folder is another user's.
    """
    with contextlib.suppress(FileNotFoundError):
        offer = Offer(**json.loads((folder / OFFER).read_text()))
        return offer if offer.pid == pid else None
    return None


class ReadService:
    """Answers queries to the chDB folder that this process has open, until `close`.

    `gives_way`: it sets `left` when whoever has its offer tells it to leave.

    Raises:
        OSError: the folder cannot be written, or nobody may listen on loopback.
    """

    def __init__(self, folder: Path, *, gives_way: bool = False) -> None:
        self.left = threading.Event()
        self._path = os.path.realpath(folder)  # as clickhouse-connect spells it: chDB compares
        self._closing = False
        self._turns = threading.BoundedSemaphore(QUERIES)
        self._count = threading.Lock()
        self._running, self._asked_s = 0, time.monotonic()
        self._server = _Server(self)
        self._offer = Offer(
            os.getpid(), int(self._server.server_address[1]), secrets.token_urlsafe(32), gives_way=gives_way
        )
        self._authorization = _authorization(self._offer.password).encode()
        self._file = folder / OFFER
        self.offer()
        threading.Thread(target=self._server.serve_forever, name="fp8scope-reading", daemon=True).start()

    def offer(self) -> None:
        """Lets others know where this answers."""
        unfinished = self._file.with_name(f".{OFFER}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600, exist_ok=False)
        unfinished.write_text(json.dumps(dataclasses.asdict(self._offer)))
        unfinished.replace(self._file)

    def withdraw(self) -> None:
        """Takes the offer back; who has read it already is answered."""
        self._file.unlink(missing_ok=True)

    def used_since(self, moment_s: float) -> bool:
        """Whether a query runs, or one has come or ended at that moment of `time.monotonic` or later."""
        with self._count:
            return self._running > 0 or self._asked_s >= moment_s

    def told_to_leave(self) -> bool:
        """Leaves, if this is one that does."""
        if self._offer.gives_way:
            self.left.set()
        return self._offer.gives_way

    def close(self) -> None:
        """Takes no more queries, and ends in about a second those that run."""
        self._closing = True
        self.withdraw()
        self._server.shutdown()
        if running := self._wait(QUERIES):
            with contextlib.closing(open_handle(self._path)) as handle:
                handle.query(f"KILL QUERY WHERE Settings['log_comment'] = '{_COMMENT}'")
        self._server.hang_up()
        self._wait(running)
        self._server.server_close()

    def _wait(self, queries: int) -> int:
        """Waits until so many have ended, at most `DRAIN_S`; returns how many have not."""
        deadline = time.monotonic() + DRAIN_S
        return queries - sum(self._turns.acquire(timeout=max(0.0, deadline - time.monotonic())) for _ in range(queries))

    def may(self, authorization: str) -> bool:
        """Whether these are the credentials in the file; takes as long whatever is wrong with them."""
        return hmac.compare_digest(authorization.encode(), self._authorization)

    def ask(self, sql: str, parameters: dict[str, str], settings: dict[str, str]) -> Generator[bytes]:
        """The answer in the format that the query names, piece by piece.

        Raises:
            QueryError: with ClickHouse's code and text.
        """
        if reason := _refusal(sql):
            raise QueryError("164", f"Code: 164. DB::Exception: {reason}. (READONLY)")
        self._counted(+1)
        try:
            yield from self._ask_in_turn(sql, parameters, settings)
        finally:
            self._counted(-1)

    def _counted(self, more: int) -> None:
        with self._count:
            self._running += more
            self._asked_s = time.monotonic()

    def _ask_in_turn(self, sql: str, parameters: dict[str, str], settings: dict[str, str]) -> Iterator[bytes]:
        if not self._turns.acquire(timeout=WAIT_S):
            text = f"{QUERIES} queries are running, as many as the collector takes; ask again"
            raise QueryError("202", f"Code: 202. DB::Exception: {text}. (TOO_MANY_SIMULTANEOUS_QUERIES)")
        try:
            if self._closing:
                raise QueryError("394", "Code: 394. DB::Exception: the collector ends. (QUERY_WAS_CANCELLED)")
            with contextlib.closing(open_handle(self._path)) as handle:
                threads = {"max_threads": _THREADS_ALONE} if self._offer.gives_way else {}
                yield from _run(handle, sql, parameters, settings, LIMITS | threads)
        except RuntimeError as error:
            code = re.search(r"Code: (\d+)", str(error))
            raise QueryError(code[1] if code else "1002", str(error)) from error
        finally:
            self._turns.release()


class QueryError(Exception):
    """A query was refused or has failed."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _authorization(password: str) -> str:
    return f"Basic {base64.b64encode(f'{USER}:{password}'.encode()).decode()}"


def open_handle(path: str) -> Any:
    """A handle to the folder that this process has open already: half a millisecond."""
    import chdb  # an extra, that whoever asks does not need

    return chdb.connect(path)  # type: ignore[no-untyped-call]  # chDB's own


def _run(
    handle: Any, sql: str, parameters: dict[str, str], settings: dict[str, str], limits: dict[str, int]
) -> Iterator[bytes]:
    asked = _FORMAT.search(sql)
    streamed = asked is not None and asked[1] in _STREAMED
    limits = limits if streamed else {"max_result_bytes": ANSWER_BYTES} | limits
    handle.query(
        "SET " + ", ".join(f"{name} = {value}" for name, value in limits.items()) + f", log_comment = '{_COMMENT}'"
    )
    for name, value in settings.items():  # ClickHouse says no, unless it is what is set already
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        handle.query(f"SET {name} = '{quoted}'")
    some = False
    if streamed:
        blocks = (block.bytes() for block in handle.send_query(sql, "Native", params=parameters))
        full = (block for block in blocks if block)
        for piece in _one_arrow_stream(full) if asked and asked[1] == "ArrowStream" else full:
            some = True
            yield piece
    if not some:  # a stream without rows has no block, and therefore no schema
        yield handle.query(sql, "TabSeparated", params=parameters).bytes()


def _one_arrow_stream(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """One stream of blocks that each are one."""
    out = io.BytesIO()
    writer = None
    for block in blocks:
        with pa.ipc.open_stream(block) as reader:
            writer = writer or pa.ipc.new_stream(out, reader.schema)
            for batch in reader:
                writer.write_batch(batch)
        yield out.getvalue()
        out.seek(0)
        out.truncate()
    if writer:
        writer.close()
        yield out.getvalue()


def _refusal(sql: str) -> str:
    """Why a query is none that only reads, as far as `readonly = 1` would let it pass; "" where it is.

    Words are looked for in all of the text, comments and strings too: rather too much is refused than parsed wrongly.
    """
    if not _ASKS.match(sql):
        return "the collector answers SELECT, WITH and DESCRIBE, and the query begins with something else"
    if ";" in sql.rstrip().removesuffix(";"):
        return "the collector answers one statement at a time, and the query has a semicolon in it"
    if _REACHES_OUT.search(sql):
        return "a query reaches for nothing but tables, and this one says file, OUTFILE or Python"
    return ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, service: ReadService) -> None:
        self.service = service
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves it in a thread of its own, and remembers it until then."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends all connections, whatever their threads wait for: one whose client reads no further has the folder."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is its own affair."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        """A query in the URL, or whether anybody is there."""
        if urlsplit(self.path).path == "/ping":
            self._answer(200, b"Ok.\n")
        else:
            self._query("")

    def do_POST(self) -> None:
        """A query in the body, or begun in the URL and ended in the body."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > BODY_BYTES:
            self.close_connection = True
            self._fail(QueryError("164", "Code: 164. DB::Exception: a query has at most 1 MiB. (READONLY)"))
            return
        self._query(self.rfile.read(int(length)).decode(errors="replace"))

    def _query(self, body: str) -> None:
        service = self.server.service
        if not service.may(self.headers.get("Authorization", "")):
            text = "Code: 516. DB::Exception: the password is not the one that this collector left in its folder"
            self._fail(QueryError("516", f"{text}. (AUTHENTICATION_FAILED)"))
            return
        if urlsplit(self.path).path == _LEAVE and service.told_to_leave():
            self._answer(200, b"Ok.\n")
            return
        said = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        sql = "\n".join(filter(None, (said.pop("query", ""), body)))
        parameters = {name.removeprefix("param_"): said.pop(name) for name in [*said] if name.startswith("param_")}
        settings = {name: value for name, value in said.items() if name not in _TRANSPORT and name.isidentifier()}
        asked = _FORMAT.search(sql)
        pieces = service.ask(sql, parameters, settings)
        with contextlib.closing(pieces):
            try:
                first = next(pieces, b"")
            except QueryError as error:
                self._fail(error)
                return
            self.send_response(200)
            self.send_header("X-ClickHouse-Format", asked[1] if asked else "TabSeparated")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self._chunk(first)
                for piece in pieces:
                    self._chunk(piece)
                self.wfile.write(b"0\r\n\r\n")
            except QueryError as error:  # the status is sent: an answer without its end is all that says so
                self.log_error("%s", error)
                self.close_connection = True

    def _chunk(self, piece: bytes) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _fail(self, error: QueryError) -> None:
        headers = {"X-ClickHouse-Exception-Code": error.code}
        self._answer(_STATUS.get(error.code, 500), f"{error}\n".encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "text/plain", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Queries are not worth a line each."""
