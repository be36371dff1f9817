"""What the edge lets in: every malformed message is refused with a sentence, before memory is spent on it."""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import grpc
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8core.records import FIELDS
from fp8scope_collector.decode import (
    Catalogues,
    RefusedError,
    decode_drops,
    decode_finish,
    decode_histograms,
    decode_open,
    decode_stats,
)
from fp8scope_collector.limits import Limits
from fp8scope_collector.messages import Source
from fp8scope_protos.v1 import telemetry_pb2 as pb

LIMITS = Limits()
SOURCE = Source(
    id=1,
    run_id=1,
    run="run",
    rank=0,
    incarnation=1,
    up_to_seq=0,
    finished=False,
    run_slot=np.arange(6),
    role=np.array([0, 1, 2, 0, 1, 2], np.int8),
    log2_max=np.full(6, 8.8),
)


@pytest.mark.parametrize("zstd", [True, False])
def test_a_batch_comes_out_as_it_went_in(wire: Any, zstd: bool) -> None:
    columns = wire.columns(7, steps=3)

    batch = decode_stats(wire.stats(5, columns, zstd=zstd), SOURCE, LIMITS)

    assert (batch.seq, batch.rows) == (5, 18)
    np.testing.assert_array_equal(batch.step, columns["step"])
    np.testing.assert_array_equal(batch.slot, columns["slot"])
    for field in FIELDS:
        np.testing.assert_array_equal(batch.columns[field.name], columns[field.name])
        assert batch.columns[field.name].dtype == (np.int64 if field.dtype == "uint64" else field.dtype)


def test_absent_columns_stay_absent(wire: Any) -> None:
    columns = wire.columns(1)
    del columns["err_sq"], columns["zeros"]

    batch = decode_stats(wire.stats(1, columns), SOURCE, LIMITS)

    assert set(batch.columns) == {field.name for field in FIELDS} - {"err_sq", "zeros"}


def test_a_batch_may_carry_scalars_only() -> None:
    message = pb.StatsBatch(seq=1, scalars=[pb.Scalar(step=3, name="loss", value=2.5)])

    batch = decode_stats(message, SOURCE, LIMITS)

    assert (batch.rows, batch.scalars) == (0, ((3, "loss", 2.5),))


def _with(column: str, value: int) -> dict[str, np.ndarray]:
    """One row of zeros, with `value` in `column`."""
    columns = {"step": np.zeros(1, np.uint64), "slot": np.zeros(1, np.uint32)}
    columns |= {field.name: np.zeros(1, field.dtype) for field in FIELDS}
    columns[column][0] = value
    return columns


def _bomb(wire: Any) -> pb.StatsBatch:
    """A frame of a few kB whose header claims 1 GiB."""
    zeros = bytes(1 << 22)
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=1 << 30)
    data = b"".join(compressor.compress(zeros) for _ in range(256)) + compressor.flush()
    return wire.stats(1, wire.columns(1), columns=data)


def _silent_bomb(wire: Any) -> pb.StatsBatch:
    """A frame that says nothing of its size, and holds more than was declared."""
    data = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    return wire.stats(1, wire.columns(1), columns=data)


MALFORMED: dict[str, tuple[Any, str]] = {
    "seq 0": (lambda w: w.stats(0, w.columns(1)), r"seq 0: seq is 0; expected 1 to 9223372036854775807"),
    "too many rows": (lambda w: w.stats(1, w.columns(1), rows=2**31), "rows has 2147483648 rows; expected at most"),
    "too many bytes": (
        lambda w: w.stats(1, w.columns(1), columns_bytes=2**31),
        "columns_bytes has 2147483648 bytes; expected at most 16777216",
    ),
    "no compression named": (
        lambda w: w.stats(1, w.columns(1), compression=0),
        "compression is 0; expected COMPRESSION_NONE or COMPRESSION_ZSTD",
    ),
    "not zstd": (lambda w: w.stats(1, w.columns(1), columns=b"\0" * 50), "columns is not one zstd frame of"),
    "no bytes": (lambda w: w.stats(1, w.columns(1), columns=b""), "columns is not one zstd frame of"),
    "a bomb": (_bomb, "columns decompresses to 1073741824 bytes; columns_bytes says"),
    "a silent bomb": (_silent_bomb, "columns is not one zstd frame of"),
    "two frames": (
        lambda w: w.stats(1, w.columns(1), columns=w.stats(1, w.columns(1)).columns * 2),
        "columns is not one zstd frame of",
    ),
    "another length": (
        lambda w: w.stats(1, w.columns(1), zstd=False, columns_bytes=3),
        "bytes before compression; columns_bytes says 3",
    ),
    "another checksum": (lambda w: w.stats(1, w.columns(1), columns_crc32=1), "columns_crc32 says 0x00000001"),
    "not protobuf": (
        lambda w: w.stats(
            1, {}, zstd=False, rows=1, columns=b"\x0a\xff", columns_bytes=2, columns_crc32=zlib.crc32(b"\x0a\xff")
        ),
        "columns is not a serialised StatsColumns",
    ),
    "no steps": (
        lambda w: w.stats(1, {**w.columns(1), "step": np.empty(0, np.uint64)}, rows=6),
        "step has 0 bytes; expected 48: 6 rows of uint64",
    ),
    "a short column": (
        lambda w: w.stats(1, {**w.columns(1), "amax": np.zeros(5, np.float32)}),
        "amax has 20 bytes; expected 24: 6 rows of float32",
    ),
    "rows without columns": (lambda w: w.stats(1, {}, rows=6, zstd=False), "step has 0 bytes; expected 48"),
    "columns without rows": (lambda w: w.stats(1, w.columns(1), rows=0), "step has 48 bytes; expected 0"),
    "an unknown slot": (lambda w: w.stats(1, _with("slot", 6)), "slot holds 6; the catalogue has the slots 0 to 5"),
    "an absurd step": (
        lambda w: w.stats(1, _with("step", 2**53 + 1)),
        "step holds 9007199254740993; expected at most 9007199254740992",
    ),
    "an absurd count": (
        lambda w: w.stats(1, _with("numel", 2**63)),
        "numel holds 9223372036854775808; expected at most",
    ),
    "a scalar without a name": (
        lambda w: pb.StatsBatch(seq=1, scalars=[pb.Scalar(step=1, value=1)]),
        "scalars.name is empty; expected a name",
    ),
    "a scalar of an absurd step": (
        lambda w: pb.StatsBatch(seq=1, scalars=[pb.Scalar(step=2**60, name="loss")]),
        "scalars.step is 1152921504606846976; expected 0 to",
    ),
    "an unprintable scalar": (
        lambda w: pb.StatsBatch(seq=1, scalars=[pb.Scalar(name="lo\nss")]),
        r"scalars.name is 'lo\\nss'; expected printable characters only",
    ),
    "an unnamed drop": (lambda w: pb.StatsBatch(seq=1, drops=[pb.Drop(rows=1)]), "drops.reason is empty"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_batch_is_refused_with_field_got_and_expected(wire: Any, case: str) -> None:
    build, sentence = MALFORMED[case]
    message = build(wire)

    with pytest.raises(RefusedError, match=sentence) as refused:
        decode_stats(message, SOURCE, LIMITS)

    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(refused.value).startswith(f"seq {message.seq}: ")


MALFORMED_OPENINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no run": ({"run": ""}, "run is empty; expected a name"),
    "no uuid": ({"source_uuid": ""}, "source_uuid is empty"),
    "unprintable run": ({"run": "a\x1b[2Jb"}, r"run is 'a\\x1b\[2Jb'; expected printable characters only"),
    "long run": ({"run": "x" * 257}, "run has 257 characters; expected at most 256"),
    "no world": ({"world_size": 0}, "world_size is 0; expected 1 to"),
    "rank outside": ({"rank": 8}, "rank is 8; expected 0 to 7"),
    "no incarnation": ({"incarnation": 0}, "incarnation is 0; expected 1 to"),
    "negative time": ({"started_unix_ns": -1}, "started_unix_ns is -1; expected 0 to"),
    "not JSON": ({"config_json": "{"}, "config_json is not JSON"),
    "deep JSON": ({"config_json": '{"a":' + "[" * 100_000}, "config_json is not JSON"),
    "no object": ({"config_json": "[1]"}, "config_json is a JSON list; expected an object"),
    "many tags": ({"tags": ["x"] * 65}, "tags has 65 entries; expected at most 64"),
    "long notes": ({"notes": "x" * 65_537}, "notes has 65537 characters"),
    "slot ids": ({"slots": [pb.Slot(slot=1)]}, r"slots\[0\].slot is 1; expected 0: ids are 0 to n-1 in order"),
    "no role": ({"slots": [pb.Slot(layer="a", format="E5M2")]}, r"slots\[0\].role is 0; expected ROLE_INPUT"),
    "no format": ({"slots": [pb.Slot(layer="a", role=1)]}, r"slots\[0\].format is ''; expected one of E4M3FN, E5M2"),
    "no layer": ({"slots": [pb.Slot(role=1, format="E5M2")]}, r"slots\[0\].layer is empty"),
    "long layer": (
        {"slots": [pb.Slot(layer="x" * 1025, role=1, format="E5M2")]},
        r"slots\[0\].layer has 1025 characters; expected at most 1024",
    ),
    "huge layer": (
        {"slots": [pb.Slot(layer="a", role=1, format="E5M2", in_features=2**31)]},
        r"slots\[0\].in_features is 2147483648; expected 0 to 2147483647",
    ),
    "twice": (
        {"slots": [pb.Slot(slot=i, layer="a", role=1, format="E5M2") for i in range(2)]},
        r"slots\[1\] is 'a' input a second time; expected each layer and role once",
    ),
}


@pytest.mark.parametrize("case", MALFORMED_OPENINGS)
def test_a_malformed_opening_is_refused_with_field_got_and_expected(wire: Any, case: str) -> None:
    fields, sentence = MALFORMED_OPENINGS[case]

    with pytest.raises(RefusedError, match=sentence):
        decode_open(wire.open(**fields), LIMITS)


def test_a_catalogue_over_the_limit_is_exhausted_resources(wire: Any) -> None:
    with pytest.raises(RefusedError, match="slots has more than 5 entries") as refused:
        decode_open(wire.open(slots=6), Limits(slots=5))

    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_sources_that_say_the_same_share_one_catalogue(wire: Any) -> None:
    catalogues = Catalogues()
    other = wire.open(rank=1)
    other.slots[2].margin = 1

    first, same, another = (
        decode_open(opening, LIMITS, catalogues) for opening in (wire.open(), wire.open("next", rank=3), other)
    )

    assert same.catalogue is first.catalogue
    assert another.catalogue is not first.catalogue
    assert another.catalogue.slots[2].margin == 1
    assert first.catalogue.slots[2].margin == 0


def test_a_shared_catalogue_does_not_outlive_its_sources(wire: Any) -> None:
    catalogues = Catalogues()
    gone = weakref.ref(decode_open(wire.open(), LIMITS, catalogues).catalogue)

    assert gone() is None


def test_an_ending_needs_an_outcome(wire: Any) -> None:
    with pytest.raises(RefusedError, match="seq 3: outcome is 0; expected OUTCOME_FINISHED or OUTCOME_FAILED"):
        decode_finish(wire.finish(3, outcome=0), SOURCE, LIMITS)


def test_too_many_drop_reasons_are_refused() -> None:
    with pytest.raises(RefusedError, match="drops has 65 reasons; expected at most 64"):
        decode_drops([pb.Drop(reason=f"r{i}", rows=1) for i in range(65)], LIMITS)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), rows=st.integers(0, 20), compression=st.integers(0, 3), frame=st.booleans())
def test_random_bytes_are_refused_or_decoded_never_worse(data: bytes, rows: int, compression: int, frame: bool) -> None:
    message = pb.StatsBatch(
        seq=1,
        rows=rows,
        compression=compression,  # type: ignore[arg-type]  # any number may come
        columns=zstandard.compress(data) if frame else data,
        columns_bytes=len(data),
        columns_crc32=zlib.crc32(data),
    )

    try:
        batch = decode_stats(message, SOURCE, LIMITS)
    except RefusedError:
        return

    assert batch.rows == rows


def test_histograms_are_decoded_as_sent(wire: Any) -> None:
    batch = decode_histograms(wire.histograms(3, [(7, 1, 0, [1, 2]), (8, 0, 254, [3, 2**63 - 1])]), SOURCE, LIMITS)

    found = batch.histograms
    assert found is not None
    assert (batch.seq, batch.rows) == (3, 0)
    assert (found.step.tolist(), found.slot.tolist()) == ([7, 8], [1, 0])
    assert (found.first_bin.tolist(), found.bins.tolist()) == ([0, 254], [2, 2])
    assert found.counts.tolist() == [1, 2, 3, 2**63 - 1]


@pytest.mark.parametrize(
    ("rows", "fields", "sentence"),
    [
        ([(1, 0, 255, [1, 1])], {}, r"seq 1: first_bin \+ bins holds 257; expected at most 256"),
        ([(1, 99, 0, [1])], {}, r"seq 1: slot holds 99; the catalogue has the slots 0 to \d+"),
        ([(1, 0, 0, [2**63])], {}, r"seq 1: counts holds 9223372036854775808; expected at most 9223372036854775807"),
        ([(2**60, 0, 0, [1])], {}, r"seq 1: step holds 1152921504606846976; expected at most 9007199254740992"),
        ([(1, 0, 0, [1])], {"rows": 2}, r"seq 1: step has 8 bytes; expected 16: 2 rows of uint64"),
        ([(1, 0, 0, [1])], {"columns_crc32": 1}, r"seq 1: columns has CRC-32 0x\w+; columns_crc32 says 0x00000001"),
    ],
)
def test_a_malformed_histogram_names_field_got_and_expected(
    wire: Any, rows: Any, fields: dict[str, int], sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence):
        decode_histograms(wire.histograms(1, rows, **fields), SOURCE, LIMITS)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (pb.Extra(step=1, slot=99, name="x"), r"seq 1: extras.slot is 99; expected 0 to \d+"),
        (pb.Extra(step=2**60, slot=0, name="x"), r"seq 1: extras.step is 1152921504606846976; expected 0 to"),
        (pb.Extra(step=1, slot=0, name=""), r"seq 1: extras.name is empty; expected a name"),
    ],
)
def test_a_malformed_extra_number_names_field_got_and_expected(extra: pb.Extra, sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        decode_stats(pb.StatsBatch(seq=1, extras=[extra]), SOURCE, LIMITS)
