"""`fp8scope-agent`: what waits in a spool, what was dropped and why, and sending it later.

    fp8scope-agent status SPOOL
    fp8scope-agent sync SPOOL --collector HOST:PORT

SPOOL is the folder of one source, or any folder above: then each source below it is meant.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from .addresses import DEFAULT_COLLECTOR, parse_addresses
from .sender import SpoolLockedError, deliver, read_source
from .spool import SOURCE_FILE, read_acked, spool_bytes, waiting
from .status import DELIVERED, LEFT_OVER, USAGE, read_drops, read_status
from .tls import tls_settings

_DEFAULT_PATIENCE_S = 30.0


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0 where nothing waits any more, 1 where something does, 2 on misuse."""
    parser = argparse.ArgumentParser(prog="fp8scope-agent", description="What waits in a spool, and sending it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status", help="say what each source has recorded, what is not sent yet, what was dropped"
    )
    status.add_argument("spool", type=Path, metavar="SPOOL")
    status.set_defaults(command=lambda arguments: _status(arguments.spool))
    sync = commands.add_parser("sync", help="send what waits")
    sync.add_argument("spool", type=Path, metavar="SPOOL")
    sync.add_argument(
        "--collector",
        default=os.environ.get("FP8SCOPE_COLLECTOR") or DEFAULT_COLLECTOR,
        help="HOST:PORT[,HOST:PORT] (FP8SCOPE_COLLECTOR; default %(default)s). FP8SCOPE_TOKEN, _TLS_CA count too.",
    )
    sync.add_argument(
        "--patience-s",
        type=float,
        default=_DEFAULT_PATIENCE_S,
        help="give up after this many seconds without progress (default %(default)g)",
    )
    sync.set_defaults(command=lambda arguments: _sync(arguments.spool, arguments.collector, arguments.patience_s))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except ValueError as error:
        print(f"fp8scope-agent: {error}", file=sys.stderr)
        return USAGE


def _status(root: Path) -> int:
    left_over = False
    for folder in _sources(root):
        status, left = read_status(folder), waiting(folder)
        left_over |= left.records > 0
        try:
            open_message = read_source(folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            left_over = True
            continue
        run = f"{open_message.project}/{open_message.run}" if open_message.project else open_message.run
        print(f"{folder}")
        print(f"  run {run}, rank {open_message.rank} of {open_message.world_size}, life {open_message.incarnation}")
        print(f"  sent {read_acked(folder).rows} rows")
        print(f"  {left.rows} rows and {left.histograms} histograms in {left.records} records wait")
        print(f"  {spool_bytes(folder) / 2**20:.1f} MiB on disk")
        for reason, count in sorted({**read_drops(folder), **status.dropped_rows}.items()):
            print(f"  dropped {count} {_dropped_things(reason)}")
        if left.records:
            for sentence in status.problems.values():
                print(f"  {sentence}")
    return LEFT_OVER if left_over else 0


def _sync(root: Path, collector: str, patience_s: float) -> int:
    addresses = parse_addresses(collector)
    tls = tls_settings(os.environ)
    left_over = False
    for folder in _sources(root):
        before = read_acked(folder).rows
        try:
            result = deliver(
                folder,
                addresses=addresses,
                token=os.environ.get("FP8SCOPE_TOKEN"),
                tls=tls,
                lifetime=_WhileProgress(patience_s),
            )
        except (SpoolLockedError, ValueError) as error:
            print(f"{error}; not touched", file=sys.stderr)
            left_over = True
            continue
        sent = read_acked(folder).rows - before
        if result == DELIVERED:
            print(f"{folder}: {sent} rows sent; nothing waits")
            continue
        left_over = True
        print(f"{folder}: {sent} rows sent, {waiting(folder).rows} rows still wait", file=sys.stderr)
        for sentence in read_status(folder).problems.values():
            print(f"  {sentence}", file=sys.stderr)
    return LEFT_OVER if left_over else 0


def _dropped_things(reason: str) -> str:
    cause = reason.removesuffix("_histograms")
    return f"rows: {cause}" if cause == reason else f"histograms: {cause}"


class _WhileProgress:
    """A sender's lifetime: nothing is added, and it goes on for as long as something is acknowledged."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._acked_seq = -1
        self._since = time.monotonic()

    def writer_ended(self) -> bool:
        """Yes: what comes later is for the next sync."""
        return True

    def expired(self, acked_seq: int) -> bool:
        """Whether nothing was acknowledged for too long."""
        if acked_seq != self._acked_seq:
            self._acked_seq, self._since = acked_seq, time.monotonic()
        return time.monotonic() - self._since > self._patience_s


def _sources(root: Path) -> list[Path]:
    folders = sorted(path.parent for path in root.rglob(SOURCE_FILE))
    if not folders:
        raise ValueError(
            f"no spool in {root}: there is no {SOURCE_FILE} in it or below. Is it the spool_dir of the run?"
        )
    return folders


if __name__ == "__main__":
    sys.exit(main())
