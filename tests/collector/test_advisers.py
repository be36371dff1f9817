"""The advisers: exact on tensors whose answer is known by hand, and merged over ranks and lives as the run is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from fp8core.formats import E4M3FN, E5M2, Fp8Format
from fp8core.records import Role
from fp8core.scaling import scale_exp2_from_amax
from fp8scope_collector.advisers import TensorHistory, advise_constant, advise_refresh, histories
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.readmodels import Slot


def tensor(
    amax: list[float],
    rms: list[float],
    *,
    role: Role = Role.INPUT,
    fmt: Fp8Format = E4M3FN,
    layer: str = "fc",
    margin: int = 0,
) -> TensorHistory:
    return TensorHistory(layer, role, fmt, margin, np.arange(len(amax)), np.array(amax), np.array(rms))


def test_interval_of_a_constant_is_bound_by_the_widest_and_the_smallest_tensor() -> None:
    wide = tensor([100.0] * 4, [14.0] * 4, layer="wide")  # 448 / (2.8 * 14) = 11.4
    small = tensor([0.5] * 4, [2.0**-8] * 4, layer="small")  # the smallest normal number is 2**-6

    (only, everything) = advise_constant([wide, small])

    assert only.role is Role.INPUT
    assert (everything.upper.scale_exp2, everything.upper.tensor) == (3, "wide input")
    assert (everything.never_clips.scale_exp2, everything.never_clips.tensor) == (2, "wide input")
    assert (everything.lower.scale_exp2, everything.lower.tensor) == (2, "small input")
    assert not everything.empty


def test_upper_end_is_never_below_what_never_clips() -> None:
    flat = tensor([1.0], [1.0])  # all elements are as large: nothing may clip

    assert advise_constant([flat])[0].upper.scale_exp2 == scale_exp2_from_amax(1.0, E4M3FN) == 8


def test_tensors_that_no_constant_serves_give_an_empty_interval_that_names_both() -> None:
    gradient = tensor([2.0**-30], [2.0**-34], role=Role.GRAD_OUTPUT, fmt=E5M2, layer="tiny")

    everything = advise_constant([tensor([400.0], [100.0]), gradient])[-1]

    assert everything.role is None
    assert everything.empty
    assert (everything.lower.tensor, everything.upper.tensor) == ("tiny grad_output", "fc input")


def test_a_step_in_a_hundred_may_be_worse_and_steps_of_zeros_say_nothing() -> None:
    steps = 300
    rms = [1.0] * steps
    rms[7] = 100.0  # one spike
    amax = [8.0 * each for each in rms]
    amax[9], rms[9] = 0.0, 0.0

    advice = advise_constant([tensor(amax, rms)])[0]

    assert advice.upper.scale_exp2 == math.floor(math.log2(448 / 2.8))
    assert advice.lower.scale_exp2 == -6
    assert advise_constant([tensor([0.0], [0.0])]) == []


def test_a_scale_that_rises_slowly_may_be_kept_as_long_as_nothing_clips() -> None:
    # amax doubles every 64 steps: a scale from before is too large then, by one bit.
    amax = [2.0 ** (step // 64) for step in range(512)]

    exact = advise_refresh([tensor(amax, amax)])[0]
    with_margin = advise_refresh([tensor(amax, amax, margin=3)])[0]

    assert exact.flips_per_step == pytest.approx(7 / 511)
    assert exact.drift == -7
    assert exact.clipped_steps[64] == 0
    assert exact.clipped_steps[128] == pytest.approx(0.5)
    assert (exact.interval, with_margin.interval) == (64, 256)


def test_an_interval_longer_than_half_of_the_run_is_not_judged() -> None:
    advice = advise_refresh([tensor([1.0] * 10, [1.0] * 10)])[0]

    assert list(advice.clipped_steps) == [1, 2, 4]
    assert advice.interval == 4


class StoredRows:
    """Answers as the reader does: two ranks; the second life writes step 1 again."""

    def slots(self, run_id: int) -> list[Slot]:
        return [Slot(0, "fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", "AmaxScaling()", 0)]

    def rows(self, run_id: int) -> Iterator[pa.RecordBatch]:
        rows: list[tuple[Any, ...]] = [
            # incarnation, rank, step, amax, numel, sum_sq
            (1, 0, 0, 2.0, 4, 4.0),
            (1, 0, 1, 64.0, 4, 64.0),
            (1, 1, 0, 3.0, 12, 60.0),
            (2, 0, 1, 1.0, 4, 1.0),
            (2, 0, 2, None, 4, 1.0),
        ]
        names = ("incarnation", "rank", "step", "amax", "numel", "sum_sq")
        columns: dict[str, list[Any]] = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        yield pa.RecordBatch.from_pydict(columns | {"layer": ["fc"] * len(rows), "role": ["input"] * len(rows)})


def test_history_merges_ranks_takes_the_newest_life_and_leaves_unknown_rows_out() -> None:
    (history,) = histories(cast(Reader, StoredRows()), 1)

    assert history.name == "fc input"
    assert history.steps.tolist() == [0, 1]
    assert history.amax.tolist() == [3.0, 1.0]
    assert history.rms.tolist() == [2.0, 0.5]
