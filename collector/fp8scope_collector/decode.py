"""Checks what a client sent and turns it into `messages`: the only place that meets bytes nobody vouched for.

Every size is compared with `Limits` before memory of that size is allocated, and a compressed batch cannot grow past
what it declared. What is wrong is a `RefusedError` with the status for the client and a sentence that names the field,
what came and what was expected.
"""

from __future__ import annotations

import hashlib
import json
import weakref
import zlib
from collections.abc import Iterable
from typing import TypeVar

import grpc
import numpy as np
import numpy.typing as npt
import zstandard
from google.protobuf.message import DecodeError

from fp8core.formats import FORMATS
from fp8core.records import FIELDS, Role
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Batch, Catalogue, Ending, Histograms, Opening, SlotSpec, Source
from fp8scope_protos.v1 import telemetry_pb2 as pb

_ROLES = {pb.ROLE_INPUT: Role.INPUT, pb.ROLE_WEIGHT: Role.WEIGHT, pb.ROLE_GRAD_OUTPUT: Role.GRAD_OUTPUT}
_OUTCOMES = {pb.OUTCOME_FINISHED: "finished", pb.OUTCOME_FAILED: "failed"}
_INT32 = 2**31 - 1
BINS = 256  # of a histogram
_INT64 = 2**63 - 1
_DECOMPRESSOR = zstandard.ZstdDecompressor(max_window_size=1 << 27)  # for one thread, the event loop's

_Columns = TypeVar("_Columns", pb.StatsColumns, pb.HistogramColumns)


class RefusedError(Exception):
    """A message that cannot be accepted: the gRPC status and the sentence that the client gets."""

    def __init__(self, message: str, code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.code = code


class Catalogues:
    """Catalogues that are in use, each once: the ranks of a job open together, and nearly all say the same."""

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[bytes, Catalogue] = weakref.WeakValueDictionary()

    def decode(self, message: pb.Open, limits: Limits) -> Catalogue:
        """The checked form of the message's slots.

        Raises:
            RefusedError: as `decode_open`.
        """
        if len(message.slots) > limits.slots:
            raise RefusedError(
                f"slots has more than {limits.slots} entries, the most that a source may have; watch fewer layers",
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        only = pb.Open()  # not Open(slots=...), which copies them one by one, in four times the time
        only.CopyFrom(message)
        for other in pb.Open.DESCRIPTOR.fields:
            if other.name != "slots":
                only.ClearField(other.name)
        digest = hashlib.sha256(only.SerializeToString(deterministic=True)).digest()
        if (catalogue := self._known.get(digest)) is None:
            catalogue = self._known[digest] = Catalogue(_decode_slots(message.slots, limits), digest)
        return catalogue


def decode_open(message: pb.Open, limits: Limits, catalogues: Catalogues | None = None) -> Opening:
    """The checked form of a stream's first message; its catalogue is one of `catalogues` where that has it.

    Raises:
        RefusedError: INVALID_ARGUMENT where it is malformed, RESOURCE_EXHAUSTED where the catalogue is too large.
    """
    if not message.run:
        raise RefusedError("run is empty; expected a name")
    if not message.source_uuid:
        raise RefusedError("source_uuid is empty; expected a random id of this process life")
    _between("world_size", message.world_size, 1, _INT32)
    _between("rank", message.rank, 0, message.world_size - 1)
    _between("incarnation", message.incarnation, 1, _INT32)
    _between("started_unix_ns", message.started_unix_ns, 0, _INT64)
    _between("sent_unix_ns", message.sent_unix_ns, 0, _INT64)
    _at_most("environment", "entries", len(message.environment), limits.environment_entries)
    _at_most("tags", "entries", len(message.tags), limits.tags)
    _at_most("notes", "characters", len(message.notes), limits.notes_chars)
    environment = {
        _name("environment's key", key, limits.name_chars): value[: limits.text_chars]
        for key, value in message.environment.items()
    }
    return Opening(
        project=_name("project", message.project, limits.name_chars),
        run=_name("run", message.run, limits.name_chars),
        rank=message.rank,
        world_size=message.world_size,
        incarnation=message.incarnation,
        source_uuid=_name("source_uuid", message.source_uuid, limits.name_chars),
        started_unix_ns=message.started_unix_ns,
        sent_unix_ns=message.sent_unix_ns,
        agent_version=_name("agent_version", message.agent_version, limits.name_chars),
        catalogue=(catalogues or Catalogues()).decode(message, limits),
        config_json=_json_object("config_json", message.config_json, limits.config_chars),
        environment_json=json.dumps(environment, sort_keys=True),
        tags_json=json.dumps([_name("tag", tag, limits.name_chars) for tag in message.tags]),
        notes=message.notes.replace("\0", ""),
    )


def decode_stats(message: pb.StatsBatch, source: Source, limits: Limits) -> Batch:
    """The checked form of a batch; its columns are views into the decompressed bytes.

    Raises:
        RefusedError: INVALID_ARGUMENT; the sentence begins with the batch's seq.
    """
    try:
        _between("seq", message.seq, 1, _INT64)
        _at_most("rows", "rows", message.rows, limits.rows)
        _at_most("scalars", "entries", len(message.scalars), limits.scalars)
        _at_most("extras", "entries", len(message.extras), limits.extras)
        columns = _parsed(pb.StatsColumns(), message, limits)
        step = _column(columns, "step", message.rows, "uint64", required=True)
        slot = _column(columns, "slot", message.rows, "uint32", required=True)
        _all_at_most("step", step, limits.step)
        _check_slots(slot, source)
        values: dict[str, npt.NDArray[np.generic]] = {}
        for field in FIELDS:
            column = _column(columns, field.name, message.rows, field.dtype, required=False)
            if len(column) and field.dtype == "uint64":
                _all_at_most(field.name, column, _INT64)
                column = column.view(np.int64)
            if len(column):
                values[field.name] = column
        return Batch(
            source=source,
            seq=message.seq,
            size_bytes=message.ByteSize() + message.columns_bytes,
            step=step.view(np.int64),
            slot=slot.astype(np.int64),
            columns=values,
            scalars=_decode_scalars(message.scalars, limits),
            extras=_decode_extras(message.extras, source, limits),
            drops=decode_drops(message.drops, limits),
            config_json=_json_object("config_json", message.config_json, limits.config_chars),
        )
    except RefusedError as refused:
        raise RefusedError(f"seq {message.seq}: {refused}", refused.code) from None


def decode_histograms(message: pb.HistogramBatch, source: Source, limits: Limits) -> Batch:
    """The checked form of a batch of histograms.

    Raises:
        RefusedError: INVALID_ARGUMENT; the sentence begins with the batch's seq.
    """
    try:
        _between("seq", message.seq, 1, _INT64)
        _at_most("rows", "rows", message.rows, limits.rows)
        columns = _parsed(pb.HistogramColumns(), message, limits)
        step = _column(columns, "step", message.rows, "uint64", required=True)
        slot = _column(columns, "slot", message.rows, "uint32", required=True)
        first_bin = _column(columns, "first_bin", message.rows, "uint8", required=True).astype(np.int64)
        bins = _column(columns, "bins", message.rows, "uint16", required=True).astype(np.int64)
        _all_at_most("step", step, limits.step)
        _check_slots(slot, source)
        _all_at_most("first_bin + bins", first_bin + bins, BINS)
        counts = _column(columns, "counts", int(bins.sum()), "uint64", required=True)
        _all_at_most("counts", counts, _INT64)
        return Batch(
            source=source,
            seq=message.seq,
            size_bytes=message.ByteSize() + message.columns_bytes,
            histograms=Histograms(step.view(np.int64), slot.astype(np.int64), first_bin, bins, counts.view(np.int64)),
            drops=decode_drops(message.drops, limits),
        )
    except RefusedError as refused:
        raise RefusedError(f"seq {message.seq}: {refused}", refused.code) from None


def decode_finish(message: pb.Finish, source: Source, limits: Limits) -> Batch:
    """The checked form of a source's end.

    Raises:
        RefusedError: INVALID_ARGUMENT; the sentence begins with the message's seq.
    """
    try:
        _between("seq", message.seq, 1, _INT64)
        _between("finished_unix_ns", message.finished_unix_ns, 0, _INT64)
        if message.outcome not in _OUTCOMES:
            raise RefusedError(f"outcome is {message.outcome}; expected OUTCOME_FINISHED or OUTCOME_FAILED")
        ending = Ending(
            message.finished_unix_ns,
            _OUTCOMES[message.outcome],
            message.message.replace("\0", "")[: limits.notes_chars],
        )
        drops = decode_drops(message.drops, limits)
    except RefusedError as refused:
        raise RefusedError(f"seq {message.seq}: {refused}", refused.code) from None
    return Batch(source=source, seq=message.seq, size_bytes=message.ByteSize(), drops=drops, ending=ending)


def decode_drops(drops: Iterable[pb.Drop], limits: Limits) -> dict[str, int]:
    """Running totals of dropped rows by reason.

    Raises:
        RefusedError: a reason is not a name, a total is out of range, or there are too many.
    """
    totals: dict[str, int] = {}
    for drop in drops:
        _between("drops.rows", drop.rows, 0, _INT64)
        totals[_required_name("drops.reason", drop.reason, limits.name_chars)] = drop.rows
        _at_most("drops", "reasons", len(totals), limits.drop_reasons)
    return totals


def _decode_slots(slots: Iterable[pb.Slot], limits: Limits) -> tuple[SlotSpec, ...]:
    decoded: list[SlotSpec] = []
    seen: set[tuple[str, Role]] = set()
    for position, slot in enumerate(slots):
        where = f"slots[{position}]"
        if slot.slot != position:
            raise RefusedError(f"{where}.slot is {slot.slot}; expected {position}: ids are 0 to n-1 in order")
        if slot.role not in _ROLES:
            raise RefusedError(f"{where}.role is {slot.role}; expected ROLE_INPUT, ROLE_WEIGHT or ROLE_GRAD_OUTPUT")
        if slot.format not in FORMATS:
            raise RefusedError(f"{where}.format is {slot.format[:80]!r}; expected one of {', '.join(FORMATS)}")
        _between(f"{where}.in_features", slot.in_features, 0, _INT32)
        _between(f"{where}.out_features", slot.out_features, 0, _INT32)
        spec = SlotSpec(
            layer=_required_name(f"{where}.layer", slot.layer, limits.layer_chars),
            role=_ROLES[slot.role],
            module_class=_name(f"{where}.module_class", slot.module_class, limits.name_chars),
            in_features=slot.in_features,
            out_features=slot.out_features,
            format=slot.format,
            recipe=_name(f"{where}.recipe", slot.recipe, limits.text_chars),
            margin=slot.margin,
        )
        if (spec.layer, spec.role) in seen:
            raise RefusedError(
                f"{where} is {spec.layer!r} {spec.role} a second time; expected each layer and role once"
            )
        seen.add((spec.layer, spec.role))
        decoded.append(spec)
    return tuple(decoded)


def _decode_scalars(scalars: Iterable[pb.Scalar], limits: Limits) -> tuple[tuple[int, str, float], ...]:
    decoded = []
    for scalar in scalars:
        _between("scalars.step", scalar.step, 0, limits.step)
        decoded.append((scalar.step, _required_name("scalars.name", scalar.name, limits.name_chars), scalar.value))
    return tuple(decoded)


def _decode_extras(
    extras: Iterable[pb.Extra], source: Source, limits: Limits
) -> tuple[tuple[int, int, str, float], ...]:
    decoded = []
    for extra in extras:
        _between("extras.step", extra.step, 0, limits.step)
        _between("extras.slot", extra.slot, 0, len(source.run_slot) - 1)
        name = _required_name("extras.name", extra.name, limits.name_chars)
        decoded.append((extra.step, extra.slot, name, extra.value))
    return tuple(decoded)


def _check_slots(slot: npt.NDArray[np.generic], source: Source) -> None:
    if len(slot) and (largest := int(slot.max())) >= len(source.run_slot):
        raise RefusedError(f"slot holds {largest}; the catalogue has the slots 0 to {len(source.run_slot) - 1}")


def _parsed(columns: _Columns, message: pb.StatsBatch | pb.HistogramBatch, limits: Limits) -> _Columns:
    """`columns` as the message has them, decompressed; empty where it has no rows."""
    if message.rows or message.columns:
        try:
            columns.ParseFromString(_decompress(message, limits))
        except DecodeError as error:
            raise RefusedError(f"columns is not a serialised {type(columns).__name__}: {error}") from None
    return columns


def _decompress(message: pb.StatsBatch | pb.HistogramBatch, limits: Limits) -> bytes:
    """The batch's columns, exactly `columns_bytes` long and with the right checksum."""
    expected = message.columns_bytes
    _at_most("columns_bytes", "bytes", expected, limits.columns_bytes)
    if message.compression == pb.COMPRESSION_NONE:
        columns = message.columns
    elif message.compression == pb.COMPRESSION_ZSTD:
        columns = _unzstd(message.columns, expected)
    else:
        raise RefusedError(f"compression is {message.compression}; expected COMPRESSION_NONE or COMPRESSION_ZSTD")
    if len(columns) != expected:
        raise RefusedError(f"columns has {len(columns)} bytes before compression; columns_bytes says {expected}")
    if (crc := zlib.crc32(columns)) != message.columns_crc32:
        raise RefusedError(f"columns has CRC-32 {crc:#010x}; columns_crc32 says {message.columns_crc32:#010x}")
    return columns


def _unzstd(data: bytes, expected: int) -> bytes:
    """Decompresses one frame into at most `expected` bytes: its header's own claim decides what would be allocated."""
    try:
        claimed = zstandard.frame_content_size(data)
        if claimed not in (expected, -1):
            raise RefusedError(f"columns decompresses to {claimed} bytes; columns_bytes says {expected}")
        if claimed == -1 and expected == 0:
            raise RefusedError("columns is a compressed frame; columns_bytes says 0")
        return _DECOMPRESSOR.decompress(data, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RefusedError(f"columns is not one zstd frame of {expected} bytes: {error}") from None


def _column(
    columns: pb.StatsColumns | pb.HistogramColumns, name: str, rows: int, dtype: str, *, required: bool
) -> npt.NDArray[np.generic]:
    """The column's values, in `dtype`; empty where it is absent."""
    data: bytes = getattr(columns, name)
    width = np.dtype(dtype).itemsize
    if not data and not required:
        return np.empty(0, dtype)
    if len(data) != rows * width:
        raise RefusedError(f"{name} has {len(data)} bytes; expected {rows * width}: {rows} rows of {dtype}")
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)


def _all_at_most(field: str, column: npt.NDArray[np.generic], limit: int) -> None:
    if len(column) and (largest := int(column.max())) > limit:
        raise RefusedError(f"{field} holds {largest}; expected at most {limit}")


def _between(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RefusedError(f"{field} is {value}; expected {low} to {high}")


def _at_most(field: str, unit: str, value: int, limit: int) -> None:
    if value > limit:
        raise RefusedError(f"{field} has {value} {unit}; expected at most {limit}")


def _required_name(field: str, value: str, limit: int) -> str:
    if not value:
        raise RefusedError(f"{field} is empty; expected a name")
    return _name(field, value, limit)


def _name(field: str, value: str, limit: int) -> str:
    _at_most(field, "characters", len(value), limit)
    if not value.isprintable():
        raise RefusedError(f"{field} is {value[:80]!r}; expected printable characters only")
    return value


def _json_object(field: str, value: str, limit: int) -> str:
    _at_most(field, "characters", len(value), limit)
    if not value:
        return ""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{field} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise RefusedError(f"{field} is a JSON {type(parsed).__name__}; expected an object")
    return value
