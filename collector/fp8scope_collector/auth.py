"""Who may send: tokens as the database has them, asked at each stream's start and again every second.

The gate keeps all tokens in memory and reads them anew once a second, in a thread of its own. So a stranger's guesses
cost no query, a revoked token's streams end within two seconds, and a database that is away for a while locks nobody
out. Nothing here puts a secret, or any part of one, into a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import grpc
import structlog

from fp8scope_collector.decode import RefusedError
from fp8scope_collector.messages import Opening
from fp8scope_collector.storage.tokens import Token, digest
from fp8scope_collector.turns import Lane

REFRESH_S = 1.0
NOTED_EVERY_NS = 60 * 10**9  # how exact `last_used_unix_ns` is

log = structlog.get_logger()


class Gate:
    """The tokens, and the streams that they opened. Made and used on the event loop, except `check_reader`.

    `read` reads all tokens; it is called here first, so that what is wrong with it shows at the start. `note_used`
    hears which tokens are in use.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[Token]],
        note_used: Callable[[int, int], None],
        unix_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._read = read
        self._note_used = note_used
        self._unix_ns = unix_ns
        self._loop = asyncio.get_running_loop()
        self._tokens = tuple(read())
        self._current = True  # whether the last reading succeeded
        self._next_reading: asyncio.Future[None] = self._loop.create_future()
        self._streams: dict[Lane, Token] = {}
        self._open: Counter[int] = Counter()  # token id -> streams, from `count` on
        self._paid_until: dict[int, float] = {}  # token id -> when its rows so far are within its rate, loop's clock
        self._noted: dict[int, int] = {}  # token id -> when it was last noted
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="fp8scope-tokens", daemon=True).start()

    def close(self) -> None:
        """Stops reading; does not wait for a database that hangs."""
        self._closing.set()

    async def identify(self, authorization: Sequence[str]) -> Token:
        """The token in the values of a stream's `authorization`; waits for one reading where it is not known yet.

        Raises:
            RefusedError: there is none, or it is not good (any more).
        """
        secret = _secret(authorization)
        if (token := self._find(secret)) is None:
            await asyncio.wait([self._next_reading], timeout=2 * REFRESH_S)  # was it made a moment ago?
            token = self._find(secret)
        if token is None and not self._current:
            raise RefusedError(
                "the token is not known here, and the database with the tokens does not answer; try again later",
                grpc.StatusCode.UNAVAILABLE,
            )
        return self._good(token)

    def admit(self, token: Token, opening: Opening) -> None:
        """Returns if the token may send this run.

        Raises:
            RefusedError: it may not, or it is not good any more.
        """
        self._good(token)
        if token.scope == "read":
            raise _denied(f"token {token.name!r} has scope read; sending needs scope ingest")
        if token.project not in (None, opening.project):
            raise _denied(f"token {token.name!r} is for project {token.project!r}; this run is of {opening.project!r}")
        if token.run not in (None, opening.run):
            raise _denied(f"token {token.name!r} is for run {token.run!r}; this is run {opening.run!r}")

    def check_reader(self, authorization: Sequence[str]) -> None:
        """Returns if a token in `authorization` may read /metrics. Any thread may call this.

        Raises:
            RefusedError: there is none, or it may not.
        """
        token = self._good(self._find(_secret(authorization)))
        if token.scope == "ingest":
            raise _denied(f"token {token.name!r} has scope ingest; reading needs scope read")
        self._loop.call_soon_threadsafe(self._note, token)

    @contextlib.contextmanager
    def count(self, token: Token) -> Iterator[None]:
        """While inside, one of the token's streams is open.

        Raises:
            RefusedError: it has as many as it may.
        """
        limit = token.max_streams
        if limit is not None and self._open[token.id] >= limit:
            raise RefusedError(
                f"token {token.name!r} has {self._open[token.id]} streams open here; it may have {limit}",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        self._open[token.id] += 1
        try:
            yield
        finally:
            self._open[token.id] -= 1

    async def pace(self, token: Token, rows: int) -> bool:
        """Returns when the token may have sent so many rows more; whether it had to wait. A second's worth is free."""
        if token.max_rows_per_s is None:
            return False
        now = self._loop.time()
        paid_until = max(now, self._paid_until.get(token.id, 0.0)) + rows / token.max_rows_per_s
        self._paid_until[token.id] = paid_until
        if (wait_s := paid_until - now - 1.0) <= 0:
            return False
        await asyncio.sleep(wait_s)
        return True

    @contextlib.contextmanager
    def watch(self, token: Token, lane: Lane) -> Iterator[None]:
        """While inside, `lane` fails as soon as the token is not good any more."""
        self._streams[lane] = token
        self._note(token)
        try:
            yield
        finally:
            del self._streams[lane]

    def _good(self, token: Token | None) -> Token:
        """The token as it is known now, if it is good.

        Raises:
            RefusedError: it is not.
        """
        newest = next((known for known in self._tokens if token and known.id == token.id), None)
        if newest is None:
            raise _unauthenticated("the token is not known to this collector")
        now = self._unix_ns()
        if (state := newest.state(now)) == "active":
            return newest
        since = newest.revoked_unix_ns if state == "revoked" else newest.expires_unix_ns
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime((since or 0) / 1e9))
        verb = "was revoked" if state == "revoked" else "expired"
        raise _unauthenticated(f"token {newest.name!r} {verb} on {when}")

    def _find(self, secret: str) -> Token | None:
        """The token with that secret; takes as long whichever it is, or none."""
        shown, found = digest(secret), None
        for token in self._tokens:
            if hmac.compare_digest(token.secret_sha256, shown):
                found = token
        return found

    def _note(self, token: Token) -> None:
        now = self._unix_ns()
        if now - self._noted.get(token.id, 0) >= NOTED_EVERY_NS:
            self._noted[token.id] = now
            self._note_used(token.id, now)

    def _run(self) -> None:
        while not self._closing.wait(REFRESH_S):
            tokens: Sequence[Token] | None = None
            try:
                tokens = self._read()
            except Exception as error:  # whatever it is, those known stay and it is tried again
                if self._current:
                    log.error("tokens cannot be read; those known stay good", error=" ".join(str(error).split()))
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._look, tokens)

    def _look(self, tokens: Sequence[Token] | None) -> None:
        """Takes what was read (None: nothing could be), wakes who waits for it, ends streams that may not go on."""
        self._current = tokens is not None
        if tokens is not None:
            self._tokens = tuple(tokens)
        self._next_reading.set_result(None)
        self._next_reading = self._loop.create_future()
        for lane, token in self._streams.items():
            try:
                self._note(self._good(token))
            except RefusedError as refused:
                lane.failure = refused
                lane.changed.set()


def _secret(authorization: Sequence[str]) -> str:
    if not authorization:
        raise _unauthenticated("no token came")
    scheme, _, secret = authorization[0].partition(" ")
    if len(authorization) > 1 or scheme.lower() != "bearer" or not secret:
        raise _unauthenticated("what came as authorization is not 'Bearer TOKEN'")
    return secret


def _unauthenticated(reason: str) -> RefusedError:
    return RefusedError(f"{reason}; `fp8scope token create` makes one", grpc.StatusCode.UNAUTHENTICATED)


def _denied(reason: str) -> RefusedError:
    return RefusedError(f"{reason}; `fp8scope token create` makes one that may", grpc.StatusCode.PERMISSION_DENIED)
