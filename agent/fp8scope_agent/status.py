"""What the two processes tell each other beside the records: small files in the spool folder, replaced atomically.

The sender has no way to the user's terminal. It writes here what it has sent, what is wrong and what the collector
asks for; the training process reads that once a second, warns once per cause, and shows the rest in
`Monitor.snapshot()`. What the training process had to drop it writes here for `fp8scope-agent status`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError

from fp8scope_protos.v1 import telemetry_pb2 as pb

from .spool import write_atomically

STATUS_FILE = "sender.json"
REQUESTS_FILE = "requests.pb"
DROPS_FILE = "drops.json"

# Exit statuses of a sender.
DELIVERED, LEFT_OVER, USAGE, LOCKED = 0, 1, 2, 3


@dataclass(frozen=True)
class SenderStatus:
    """A sender's position and troubles. `problems` maps a cause to its sentence, with the way out."""

    pid: int = 0
    connected: bool = False
    address: str = ""
    acked_seq: int = 0
    acked_rows: int = 0  # rows that the collector has committed
    problems: dict[str, str] = field(default_factory=dict)
    dropped_rows: dict[str, int] = field(default_factory=dict)  # by reason, what the sender itself had to give up
    refused_seqs: tuple[int, ...] = ()  # set aside: the collector refused them
    finished: bool = False  # the collector has committed the end of this source
    ended: bool = False  # this sender has left; what remains is for `fp8scope-agent sync`


def read_status(folder: Path) -> SenderStatus:
    """The last status in `folder`; an empty one where no sender has written, or the file is damaged."""
    try:
        data = json.loads((folder / STATUS_FILE).read_bytes())
        status = SenderStatus(**data)
        return dataclasses.replace(status, refused_seqs=tuple(status.refused_seqs))
    except (OSError, ValueError, TypeError):
        return SenderStatus()


def write_status(folder: Path, status: SenderStatus) -> None:
    """Replace the status in `folder`.

    Raises:
        OSError: the disk refused it.
    """
    write_atomically(folder / STATUS_FILE, json.dumps(dataclasses.asdict(status), indent=1).encode())


def read_drops(folder: Path) -> dict[str, int]:
    """What the training process had to give up, by reason, as it last said."""
    try:
        drops = json.loads((folder / DROPS_FILE).read_bytes())
        return {str(reason): int(rows) for reason, rows in drops.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_drops(folder: Path, drops: Mapping[str, int]) -> None:
    """Replace the training process's drops in `folder`.

    Raises:
        OSError: the disk refused it.
    """
    write_atomically(folder / DROPS_FILE, json.dumps(drops, sort_keys=True).encode())


def read_requests(folder: Path) -> list[pb.Request]:
    """What the collector has asked for, the newest last; each has an id."""
    try:
        return list(pb.ServerMessage.FromString((folder / REQUESTS_FILE).read_bytes()).requests)
    except (OSError, DecodeError):
        return []


def write_requests(folder: Path, requests: Iterable[pb.Request]) -> None:
    """Replace the requests in `folder`.

    Raises:
        OSError: the disk refused it.
    """
    write_atomically(folder / REQUESTS_FILE, pb.ServerMessage(requests=requests).SerializeToString())


def sync_command(folder: Path, addresses: tuple[str, ...]) -> str:
    """What to type to send the rest of a spool later."""
    return f"fp8scope-agent sync {shlex.quote(str(folder))} --collector {','.join(addresses)}"
