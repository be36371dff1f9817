"""One connection of the sender to one collector, from Open to its end; it says why it ended.

The thread that calls `Stream.run` owns everything. gRPC reads requests from a queue and a second thread puts what
the server says into another, so that a server that hangs can hold up neither: each wait here has a limit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import grpc

from fp8scope_protos.v1 import telemetry_pb2 as pb

from .delivery import Delivery

_METHOD = "/fp8scope.v1.Telemetry/Stream"
_MORE = pb.ClientMessage(more=True).SerializeToString()  # behind a serialised message it sets that field of it
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a new connection is a new attempt: the sender does the back-off
    ("grpc.enable_http_proxy", 0),  # the collector stands in the training's own network
    ("grpc.keepalive_time_ms", 30_000),  # a host that vanished while nothing was owed is noticed within a minute
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # how long one attempt to connect may take
)


@dataclass(frozen=True)
class Timing:
    """Seconds. Tests shorten them."""

    poll_s: float = 0.1  # how often the spool is looked at when nothing else happens
    heartbeat_s: float = 5.0  # after this long without a message
    opened_s: float = 10.0  # for the answer to Open
    acked_s: float = 2.0  # for any answer while something is unacknowledged; collectors repeat themselves
    turn_s: float = 4.0  # for any word while nothing is under way and the turn does not come
    drain_s: float = 2.0  # for the last acks of a server that goes down


@dataclass(frozen=True)
class Ended:
    """Why a connection ended. `cause` is done, expired, draining, closed, silent, or the name of a gRPC status."""

    cause: str
    detail: str = ""
    opened: bool = False  # whether the collector had accepted Open


class Stream:
    """One attempt to deliver a source to the collector at `address`."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        certificates: tuple[bytes, bytes | None, bytes | None] | None,
        open_message: pb.Open,
        delivery: Delivery,
        timing: Timing,
        nothing_comes: Callable[[], bool],
        expired: Callable[[], bool],
        progressed: Callable[[], None],
        asked: Callable[[Sequence[pb.Request]], None],
    ) -> None:
        """`certificates`: roots, private key and chain; None: no TLS.

        `nothing_comes`: the writer has ended. `expired`: stop now. `progressed`: called often while connected.
        `asked`: called with what the collector would like to see more of.
        """
        self._address = address
        self._certificates = certificates
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._open = open_message
        self._delivery = delivery
        self._timing = timing
        self._nothing_comes = nothing_comes
        self._expired = expired
        self._progressed = progressed
        self._asked = asked
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[pb.ServerMessage | Ended] = queue.SimpleQueue()
        self._opened = False
        self._draining = False
        self._turns: int | None = None  # messages of the spool that may have been sent, in all; None: any number
        self._taken = 0  # and were
        self._last_heard = self._last_sent = time.monotonic()
        self._drops_sent: Mapping[str, int] = {}

    def run(self) -> Ended:
        """Deliver until there is nothing more to deliver, time is up, or the connection ends."""
        with self._channel() as channel:
            method = channel.stream_stream(
                _METHOD, request_serializer=_as_it_is, response_deserializer=pb.ServerMessage.FromString
            )
            call = method(self._requests(), metadata=self._metadata)
            threading.Thread(target=self._receive, args=(call,), daemon=True).start()
            try:
                ended = self._exchange()
            finally:
                self._outgoing.put(None)
                call.cancel()
        return Ended(ended.cause, ended.detail, self._opened)

    def _channel(self) -> grpc.Channel:
        if self._certificates is None:
            return grpc.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(*self._certificates)
        return grpc.secure_channel(self._address, credentials, options=_CHANNEL_OPTIONS)

    def _exchange(self) -> Ended:
        self._open.sent_unix_ns = time.time_ns()
        more = bool(self._delivery.pending) or self._delivery.more()
        self._send(pb.ClientMessage(open=self._open, more=more).SerializeToString())
        while True:
            try:
                message = self._incoming.get(timeout=self._timing.poll_s)
            except queue.Empty:
                message = None
            if isinstance(message, Ended):
                return message
            if message is not None:
                self._handle(message)
            if self._draining:
                return self._hang_up(Ended("draining", f"the collector at {self._address} is going down"))
            if self._opened:
                self._progressed()
                ending = self._nothing_comes()
                sent = self._send_records()
                all_sent = not sent and not self._delivery.pending and not self._waits_for_a_turn()
                if self._delivery.finished or (ending and all_sent):
                    return self._hang_up(Ended("done"))
                self._send_heartbeat()
            if self._expired():
                return Ended("expired")
            silent_s = time.monotonic() - self._last_heard
            if not self._opened and silent_s > self._timing.opened_s:
                return Ended("silent", f"no answer to Open within {self._timing.opened_s:g} s")
            if self._delivery.pending and silent_s > self._timing.acked_s:
                return Ended("silent", f"no acknowledgement within {self._timing.acked_s:g} s")
            if self._waits_for_a_turn() and silent_s > self._timing.turn_s:
                return Ended("silent", f"no turn to send within {self._timing.turn_s:g} s, and no word")

    def _handle(self, message: pb.ServerMessage) -> None:
        self._last_heard = time.monotonic()
        if message.window:
            self._delivery.set_window(message.window)
        if message.HasField("turns"):
            self._turns = message.turns
        body = message.WhichOneof("body")
        if body == "opened":
            self._delivery.resume(message.opened.up_to_seq, takes_histograms=message.opened.takes_histograms)
            self._opened = True
        elif body == "ack":
            self._delivery.acknowledge(message.ack.up_to_seq)
        if message.requests:
            self._asked(message.requests)
        self._draining |= message.draining

    def _send_records(self) -> bool:
        """Send what the window and the turns allow; whether there was anything."""
        sent = False
        while not self._is_out_of_turns() and (record := self._delivery.take()) is not None:
            if len(self._delivery.pending) == 1:
                self._last_heard = time.monotonic()  # no answer was owed until now
            self._send(record.payload + _MORE if self._delivery.more() else record.payload)
            self._taken += 1
            sent = True
        return sent

    def _is_out_of_turns(self) -> bool:
        return self._turns is not None and self._taken >= self._turns

    def _waits_for_a_turn(self) -> bool:
        return self._opened and self._is_out_of_turns() and self._delivery.more()

    def _send_heartbeat(self) -> None:
        drops = self._delivery.dropped_rows
        if time.monotonic() - self._last_sent < self._timing.heartbeat_s and drops == self._drops_sent:
            return
        heartbeat = pb.Heartbeat(
            sent_unix_ns=time.time_ns(),
            drops=[pb.Drop(reason=reason, rows=rows) for reason, rows in sorted(drops.items())],
        )
        self._send(pb.ClientMessage(heartbeat=heartbeat).SerializeToString())
        self._drops_sent = drops

    def _hang_up(self, ended: Ended) -> Ended:
        """Close our half and take the acks that are still owed, for a bounded time."""
        self._outgoing.put(None)
        deadline = time.monotonic() + self._timing.drain_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                message = self._incoming.get(timeout=left_s)
            except queue.Empty:
                break
            if isinstance(message, Ended):
                break
            self._handle(message)
        self._progressed()
        return ended

    def _send(self, data: bytes) -> None:
        self._outgoing.put(data)
        self._last_sent = time.monotonic()

    def _requests(self) -> Iterator[bytes]:
        while (data := self._outgoing.get()) is not None:
            yield data

    def _receive(self, call: Iterator[pb.ServerMessage]) -> None:
        try:
            for message in call:
                self._incoming.put(message)
            self._incoming.put(Ended("closed", f"the collector at {self._address} closed the stream"))
        except grpc.RpcError as error:
            self._incoming.put(Ended(error.code().name.lower(), error.details() or ""))


def _as_it_is(data: bytes) -> bytes:
    return data
