"""Marked rows become findings, and medians are found, at once for all tensors: the same as one tensor after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fp8core.records import Role
from fp8scope_collector.diagnosis.finding import Severity, findings
from fp8scope_collector.diagnosis.rolling import all_of_last, median
from fp8scope_collector.diagnosis.thresholds import GAP_ROWS
from fp8scope_collector.diagnosis.window import Bools, Floats, Ints, Window
from fp8scope_collector.storage.readmodels import Slot

ROWS, SLOTS, FRESH, LATE = 90, 6, 7, 2
SLOTS_HERE = tuple(Slot(i, f"fc{i}", Role.INPUT, "Linear", 8, 8, "E4M3FN", "AmaxScaling()", 0) for i in range(SLOTS))


def one_after_another(window: Window, bad: Bools, still: Bools, worst: Floats, levels: Ints) -> Iterator[list[Any]]:
    for rank in range(bad.shape[0]):
        for slot in range(SLOTS):
            marked = [row for row in range(FRESH, ROWS) if bad[rank, row, slot] or still[rank, row, slot]]
            parts: list[list[int]] = []
            for row in marked:
                opens = bad[rank, row, slot] and parts and not any(bad[rank, parts[-1], slot])
                if not parts or row - parts[-1][-1] > GAP_ROWS or opens:
                    parts.append([])
                parts[-1].append(row)
            for part in parts:
                opening = [row for row in part if bad[rank, row, slot]]
                at = opening[int(np.argmax(worst[rank, opening, slot]))] if opening else part[-1]
                yield [
                    *(slot, window.ranks if bad.shape[0] < len(window.ranks) else (rank,)),
                    *(part[0] - (LATE if opening else 0) + 100, part[-1] + 100, len(part)),
                    float(worst[rank, at, slot]) if opening else -math.inf,
                    3 * at,
                    Severity(levels[rank, opening, slot].max()) if opening else Severity.INFO,
                    {"how": float(worst[rank, at, slot])} if opening else {},
                    f"{at}, {slot}" if opening else "",
                ]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 1.0])
def test_stretches_are_found_as_one_tensor_after_another_has_them(share: float, ranks: int) -> None:
    chance = np.random.default_rng(ranks)
    shape = (ranks, ROWS, SLOTS)
    window = Window(3 * np.arange(ROWS), tuple(range(ranks)), SLOTS_HERE, {}, {}, first_row=100, fresh=FRESH)
    for axis in {1, ranks}:  # of all ranks together, and of each
        bad, still = (chance.random((axis, *shape[1:])) < at for at in (share, 0.04))
        worst = chance.choice([np.nan, -np.inf, 1.0, 2.0, 3.0, np.inf], bad.shape, p=[0.02, 0.2, 0.2, 0.2, 0.36, 0.02])
        levels = chance.integers(1, 4, bad.shape)

        told = findings(
            *(window, "rule", bad, worst),
            severity=levels,
            still=still,
            late=LATE,
            numbers={"how": worst},
            note=lambda row, slot: f"{row}, {slot}",
        )

        found = [
            [
                *(each.slot and each.slot.slot, each.ranks, each.first_row, each.last_row, each.rows),
                *(each.worst, each.worst_step, each.severity, dict(each.numbers), each.note),
            ]
            for each in told
        ]
        assert repr(found) == repr(list(one_after_another(window, bad, still, worst, levels)))


@pytest.mark.parametrize("size", [1, 2, 5, 78])
def test_a_median_is_numpys_to_the_bit(size: int) -> None:
    values = np.random.default_rng(size).normal(size=(3, 40, size))
    values[0, :5, 0], values[1, :5, -1], values[2, 7] = np.nan, np.inf, np.nan

    np.testing.assert_array_equal(median(values), np.median(values, axis=-1))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 40, 64])
def test_rows_that_are_all_marked_are_counted_from_any_of_them(rows: int) -> None:
    marks = np.random.default_rng(rows).random((2, 50, 9)) < 0.9 ** (1 / rows)

    expected = [marks[:, max(0, i + 1 - rows) : i + 1].all(axis=1) & (i + 1 >= rows) for i in range(50)]
    np.testing.assert_array_equal(all_of_last(marks, rows), np.stack(expected, axis=1))
