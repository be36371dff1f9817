"""The sender process: `python -m fp8scope_agent.sender SPOOL --collector HOST:PORT[,HOST:PORT]`.

It tails one source's spool and streams it to a collector, so that gRPC never lives in a process that forks
DataLoader workers and a dead network never reaches the training step. It imports neither torch nor numpy.

It ends when the source is delivered to its end; or, once the writer has closed the spool or its process is gone,
after a bounded time: what is left then waits for `fp8scope-agent sync`. One sender works on a spool at a time.
The token comes through the environment (FP8SCOPE_TOKEN), where `ps` does not show it; so do the files of TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError

from fp8scope_protos.v1 import telemetry_pb2 as pb

from .addresses import parse_addresses
from .delivery import Delivery
from .spool import CLOSED_FILE, SOURCE_FILE
from .status import (
    DELIVERED,
    LEFT_OVER,
    LOCKED,
    USAGE,
    SenderStatus,
    read_requests,
    read_status,
    sync_command,
    write_requests,
    write_status,
)
from .stream import Ended, Stream, Timing
from .tls import Tls, tls_settings, trouble

LOCK_FILE = "sender.lock"

_FIRST_BACK_OFF_S = 0.1
_LONGEST_BACK_OFF_S = 10.0
_LOOK_S = 0.1  # how often a waiting sender looks whether the writer has ended
_SAVE_S = 0.5  # how often the position is noted on disk while acknowledgements come in
_FOR_A_PERSON = {"unauthenticated", "permission_denied", "failed_precondition", "unimplemented", "invalid_argument"}
_FOR_A_PERSON |= {"tls_files", "tls_wanted", "tls_not_spoken", "certificate", "client_certificate"}
_REQUESTS_KEPT = 64
_LIMIT_TRIES = 8  # a record that is over a limit this often is set aside


class SpoolLockedError(RuntimeError):
    """Another sender works on this spool."""


class Lifetime(Protocol):
    """How long a sender goes on."""

    def writer_ended(self) -> bool:
        """Whether nothing is added to the spool any more."""

    def expired(self, acked_seq: int) -> bool:
        """Whether to stop with what is left; `acked_seq` shows progress."""


class WriterLifetime:
    """As long as the writer lives, and at most `linger_s` after it closed the spool or died."""

    def __init__(self, folder: Path, *, parent: int, linger_s: float, clock: Callable[[], float] = time.monotonic):
        self._closed = folder / CLOSED_FILE
        self._parent = parent
        self._linger_s = linger_s
        self._clock = clock
        self._deadline: float | None = None

    def writer_ended(self) -> bool:
        """Whether the spool is closed, or the process that started this one is gone."""
        return os.getppid() != self._parent or self._closed.exists()

    def expired(self, acked_seq: int) -> bool:
        """Whether the writer ended more than `linger_s` ago, progress or not."""
        if self._deadline is None and self.writer_ended():
            self._deadline = self._clock() + self._linger_s
        return self._deadline is not None and self._clock() > self._deadline


def main(argv: list[str] | None = None) -> int:
    """Run a sender from its command line; the exit status says whether everything was delivered."""
    parser = argparse.ArgumentParser(prog="python -m fp8scope_agent.sender", description="Send one spool folder.")
    parser.add_argument("spool", type=Path)
    parser.add_argument("--collector", required=True, help="HOST:PORT[,HOST:PORT]")
    parser.add_argument("--parent", type=int, required=True, help="process id of the writer, which started this one")
    parser.add_argument("--linger-s", type=float, required=True, help="seconds to go on after it ended")
    arguments = parser.parse_args(argv)
    try:
        return deliver(
            arguments.spool,
            addresses=parse_addresses(arguments.collector),
            token=os.environ.get("FP8SCOPE_TOKEN"),
            tls=tls_settings(os.environ),
            lifetime=WriterLifetime(arguments.spool, parent=arguments.parent, linger_s=arguments.linger_s),
        )
    except SpoolLockedError as error:
        print(error, file=sys.stderr)
        return LOCKED
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE


def deliver(
    folder: Path,
    *,
    addresses: tuple[str, ...],
    token: str | None,
    lifetime: Lifetime,
    tls: Tls | None = None,
    timing: Timing | None = None,
) -> int:
    """Send what is in `folder` until the writer has ended and all is sent, or `lifetime` has expired.

    Returns DELIVERED or LEFT_OVER.

    Raises:
        SpoolLockedError: another sender works on this folder.
        ValueError: `folder` is no spool of a source, or cannot be written.
    """
    open_message = read_source(folder)
    with _lock(folder):
        return _Sender(folder, open_message, addresses, token, tls, lifetime, timing or Timing()).run()


def read_source(folder: Path) -> pb.Open:
    """Who wrote the spool in `folder`.

    Raises:
        ValueError: it is no spool, or its description is damaged.
    """
    try:
        return pb.Open.FromString((folder / SOURCE_FILE).read_bytes())
    except OSError as error:
        raise ValueError(f"{folder} is no spool of a run: {SOURCE_FILE} cannot be read ({error.strerror})") from None
    except DecodeError:
        raise ValueError(
            f"{folder / SOURCE_FILE} is damaged; without it nobody knows whose records these are"
        ) from None


class _Sender:
    def __init__(
        self,
        folder: Path,
        open_message: pb.Open,
        addresses: tuple[str, ...],
        token: str | None,
        tls: Tls | None,
        lifetime: Lifetime,
        timing: Timing,
    ) -> None:
        before = read_status(folder)
        self._folder = folder
        self._open = open_message
        self._addresses = addresses
        self._token = token
        self._tls = tls
        self._lifetime = lifetime
        self._timing = timing
        self._delivery = Delivery(folder, refused_seqs=before.refused_seqs, dropped_rows=before.dropped_rows)
        self._requests = read_requests(folder)
        self._problems: dict[str, str] = {}
        self._over_limit: dict[int, int] = {}
        self._saved = SenderStatus()
        self._saved_at = float("-inf")

    def run(self) -> int:
        back_off_s = _FIRST_BACK_OFF_S
        attempt = 0
        while True:
            address = self._addresses[attempt % len(self._addresses)]
            before = self._progress()
            ended = self._connect(address)
            if ended.cause in ("done", "expired"):
                break
            self._judge(address, ended)
            self._save(address, connected=False)
            if self._progress() > before:
                back_off_s = _FIRST_BACK_OFF_S
            elif ended.cause in _FOR_A_PERSON and not ended.opened:
                back_off_s = _LONGEST_BACK_OFF_S
            if not self._wait(back_off_s * random.uniform(0.5, 1.0)):
                break
            back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)
            attempt += 1
        self._save("", connected=False, ended=True)
        if ended.cause == "done":
            return DELIVERED
        print(f"not everything was sent; later: {sync_command(self._folder, self._addresses)}", flush=True)
        return LEFT_OVER

    def _connect(self, address: str) -> Ended:
        try:
            ended = self._converse(address, self._tls.read() if self._tls else None)
            if ended.cause == "unavailable" and not ended.opened and (found := trouble(address, self._tls)):
                return Ended(found.cause, found.detail)
        except ValueError as error:
            return Ended("tls_files", str(error))
        return ended

    def _converse(self, address: str, certificates: tuple[bytes, bytes | None, bytes | None] | None) -> Ended:
        stream = Stream(
            address,
            token=self._token,
            certificates=certificates,
            open_message=self._open,
            delivery=self._delivery,
            timing=self._timing,
            nothing_comes=self._lifetime.writer_ended,
            expired=self._expired,
            progressed=lambda: self._save(address, connected=True),
            asked=self._pass_on,
        )
        return stream.run()

    def _pass_on(self, requests: Sequence[pb.Request]) -> None:
        """Lay what the collector asks for where the training process looks once a second."""
        by_id = {request.id: request for request in (*requests, *self._requests)}
        new = [request for request in by_id.values() if request not in self._requests]
        if new:
            self._requests = [*self._requests, *new][-_REQUESTS_KEPT:]
            with contextlib.suppress(OSError):
                write_requests(self._folder, self._requests)

    def _progress(self) -> tuple[int, int]:
        return self._delivery.acked.seq, len(self._delivery.refused_seqs)

    def _expired(self) -> bool:
        return self._lifetime.expired(self._delivery.acked.seq)

    def _wait(self, seconds: float) -> bool:
        """Back off, unless the writer ends meanwhile: then there is no time to lose. False where time is up."""
        ended_before = self._lifetime.writer_ended()
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._lifetime.writer_ended() == ended_before:
            if self._expired():
                return False
            time.sleep(min(_LOOK_S, max(0.0, until - time.monotonic())))
        return not self._expired()

    def _judge(self, address: str, ended: Ended) -> None:
        """Draw the consequences of a connection's end, and note what a person should know."""
        if ended.opened and ended.cause in ("invalid_argument", "resource_exhausted") and self._delivery.pending:
            self._refused(address, ended)
        elif ended.cause != "draining":
            sentence = _sentence(address, ended, self._folder)
            cause = "unknown_host" if _is_unknown_host(ended) else ended.cause
            self._problems[cause] = sentence

    def _refused(self, address: str, ended: Ended) -> None:
        sure = True
        if ended.cause == "resource_exhausted":
            seq = self._delivery.pending[0].seq
            self._over_limit[seq] = self._over_limit.get(seq, 0) + 1
            sure = self._over_limit[seq] >= _LIMIT_TRIES
        record = self._delivery.refuse(sure=sure)
        if record is not None:
            self._problems["refused"] = (
                f"the collector at {address} refused record {record.seq} ({record.rows} rows): {ended.detail}. It is "
                f"set aside as {self._folder}/refused-{record.seq}.pb and counted as dropped; the others go on. "
                "Compare the versions of the agent and the collector."
            )

    def _save(self, address: str, *, connected: bool, ended: bool = False) -> None:
        now = time.monotonic()
        if connected and now - self._saved_at < _SAVE_S and not self._delivery.finished:
            return
        if connected and self._delivery.dropped_rows.get("not_taken_histograms"):
            self._problems["not_taken"] = (
                f"the collector at {address} is older than this agent and takes no histograms: they are dropped, and "
                "counted; everything else goes on. Update it, or record none with histogram_every=0."
            )
        status = SenderStatus(
            pid=os.getpid(),
            connected=connected,
            address=address,
            acked_seq=self._delivery.acked.seq,
            acked_rows=self._delivery.acked.rows,
            problems=dict(self._problems),
            dropped_rows=self._delivery.dropped_rows,
            refused_seqs=tuple(self._delivery.refused_seqs),
            finished=self._delivery.finished,
            ended=ended,
        )
        if status == self._saved:
            return
        self._saved, self._saved_at = status, now
        self._delivery.save()
        with contextlib.suppress(OSError):
            write_status(self._folder, status)


def _sentence(address: str, ended: Ended, folder: Path) -> str:
    waits = f"What is recorded waits in {folder} and is sent as soon as that works"
    if _is_unknown_host(ended):
        return (
            f"the collector's host in {address!r} is unknown ({ended.detail}). Check collector= or FP8SCOPE_COLLECTOR. "
            f"{waits}."
        )
    match ended.cause:
        case "unavailable" | "closed":
            return (
                f"no collector answers at {address} ({ended.detail}). Start one with 'fp8scope serve', or name it with "
                f'collector="HOST:PORT" or FP8SCOPE_COLLECTOR. {waits}.'
            )
        case "silent":
            return (
                f"the collector at {address} hangs: {ended.detail}. Look at its log; a restart loses nothing. {waits}."
            )
        case "unauthenticated" | "permission_denied":
            return (
                f"the collector at {address} refuses the token ({ended.detail}). Pass token= or set FP8SCOPE_TOKEN to "
                f"one that it knows. {waits}; 'fp8scope-agent sync' takes another token."
            )
        case "tls_wanted":
            return (
                f"the collector at {address} speaks TLS and this agent does not. Set FP8SCOPE_TLS_CA to the PEM file "
                f"of the certificates to trust. {waits}."
            )
        case "tls_not_spoken":
            return (
                f"the collector at {address} does not speak TLS, and FP8SCOPE_TLS_CA asks for it. Start it with "
                f"--tls-cert and --tls-key, or unset the variable where the network is private. {waits}."
            )
        case "certificate":
            return (
                f"the certificate of the collector at {address} is not trusted ({ended.detail}). Compare "
                f"FP8SCOPE_TLS_CA, the name in the address and the certificate's names and dates. {waits}."
            )
        case "client_certificate":
            return (
                f"the collector at {address} does not accept this agent's certificate ({ended.detail}). Set "
                f"FP8SCOPE_TLS_CLIENT_CERT and FP8SCOPE_TLS_CLIENT_KEY to one that its --tls-client-ca has signed. "
                f"{waits}."
            )
        case "tls_files":
            return f"the files of TLS cannot be used: {ended.detail}. {waits}."
        case "failed_precondition":
            return (
                f"the collector at {address} refuses this run: {ended.detail}. A changed model needs another run name. "
                f"What is recorded waits in {folder}."
            )
        case "unimplemented":
            return (
                f"something answers at {address}, but it is no fp8scope collector ({ended.detail}). Check collector= "
                f"or FP8SCOPE_COLLECTOR. {waits}."
            )
        case _:
            return f"the collector at {address} ended the connection: {ended.cause}, {ended.detail}. {waits}."


def _is_unknown_host(ended: Ended) -> bool:
    detail = ended.detail.lower()
    return ended.cause == "unavailable" and ("dns" in detail or "name or service" in detail or "domain name" in detail)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with this process whatever happens to it."""
    try:
        file = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); a sender keeps its position there") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpoolLockedError(f"another sender is sending {folder} (process {read_status(folder).pid})") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
