"""How much one client may send: checked before anything of that size is allocated. docs/storage.md lists them."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on one message and on the memory of the whole collector."""

    message_bytes: int = 16 * MIB  # a serialised message, so also the whole catalogue of a source
    columns_bytes: int = 16 * MIB  # columns of a batch after decompression
    rows: int = 131_072  # of a batch
    slots: int = 65_536  # of a source
    scalars: int = 65_536  # of a batch
    extras: int = 131_072  # of a batch
    drop_reasons: int = 64  # of a source
    name_chars: int = 256  # a run, project, scalar, drop reason, tag
    layer_chars: int = 1024
    text_chars: int = 4096  # a recipe, a value of the environment
    environment_entries: int = 256
    tags: int = 64
    notes_chars: int = 65_536
    config_chars: int = MIB
    open_s: float = 30.0  # from a stream's start to its `Open`
    streams: int = 16_384  # open at once
    step: int = 2**53  # exact in a float64, as plots and JSON need
    queue_bytes: int = 64 * MIB  # decoded batches that wait for the writer, of all streams together
