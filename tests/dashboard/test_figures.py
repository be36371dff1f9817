"""What a picture must not lose: zeros, missing data, extremes, model order; and what travels to the browser."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from fp8core.records import Role
from fp8scope_collector.storage.reader import HeatMap, Histograms, Quantity, Ranks, Series, Slot, Spread
from fp8scope_dashboard import heatmaps, links, names, text
from fp8scope_dashboard.charts import overview, panels, ranking, ranks, scales, tensor
from fp8scope_dashboard.component import message, panel


def a_slot(number: int, layer: str = "", role: Role = Role.INPUT, margin: int = 0) -> Slot:
    return Slot(number, layer or f"l.{number}", role, "Fp8Linear", 16, 16, "E4M3FN", "AmaxScaling()", margin)


def a_map(quantity: Quantity, values: list[list[float]]) -> HeatMap:
    high = np.array(values, dtype=np.float64)
    return HeatMap(quantity, 4, 2, np.arange(len(values)), high.copy(), high)


def test_zero_missing_and_one_element_are_three_colours() -> None:
    heatmap = a_map("overflow", [[0.0, np.nan, 1e-6, 0.5]])

    shown = overview.ready(heatmap, np.array([0]), [a_slot(0)])

    zero, missing, one, half = shown.exact[0]
    scale = shown.scale["$theme"]["light"]
    ground_until = shown.low + scale[1][0] * (shown.high - shown.low)
    assert zero < shown.low  # clamped to the first colour, the ground
    assert np.isnan(missing)
    assert ground_until <= one < half <= shown.high
    assert (scale[0][1], scale[1][1]) == ("$ground", "$ground")
    assert scale[2][1] != "$ground"


def test_headroom_is_coloured_against_the_margin() -> None:
    shown = overview.ready(a_map("headroom", [[3.5, -1.0]]), np.array([0]), [a_slot(0, margin=3)])

    assert shown.reference is not None
    np.testing.assert_array_equal(shown.exact - shown.reference, [[0.5, -4.0]])


def test_scale_is_coloured_against_its_usual_range_and_the_farther_extreme_wins() -> None:
    low, high = np.array([[4.0, 4, 4, 1, np.nan]]), np.array([[4.0, 5, 4, 4, np.nan]])
    heatmap = HeatMap("scale_exp2", 1, 0, np.array([0]), low, high)

    shown = overview.ready(heatmap, np.array([0]), [a_slot(0)])

    np.testing.assert_array_equal(shown.exact, [[0, 1, 0, -3, np.nan]])


def test_a_scale_that_varies_within_each_column_as_always_has_no_colour() -> None:
    low, high = np.array([[4.0, 4, 4, 5, 2, 4]]), np.array([[6.0, 6, 6, 5, 6, 7]])
    heatmap = HeatMap("scale_exp2", 32, 0, np.array([0]), low, high)

    shown = overview.ready(heatmap, np.array([0]), [a_slot(0)])

    np.testing.assert_array_equal(shown.exact, [[0, 0, 0, 0, -2, 1]])
    assert shown.usual is not None
    assert shown.usual[:, 0, 0].tolist() == [4, 6]


@pytest.mark.parametrize(
    ("quantity", "values", "worse"),
    [("overflow", [0.0, 0.25], 1), ("sqnr_db", [20.0, 31.0], 0), ("scale_exp2", [5.0, 9.0], 1)],
)
def test_a_row_of_many_layers_has_the_worst_ones_colour_and_a_click_opens_that_one(
    quantity: Quantity, values: list[float], worse: int
) -> None:
    usual = {"overflow": 0.0, "sqnr_db": 31.5, "scale_exp2": 5.0}[quantity]
    slots = [a_slot(i, f"blocks.{i // 2}.mlp.fc{1 + i % 2}") for i in range(1600)]
    grid = np.full((1600, 3), usual)
    grid[801:803, 1] = values
    heatmap = HeatMap(quantity, 4, 2, np.arange(1600), grid.copy(), grid)

    shown = overview.made_ready(heatmap, slots)
    figure, height = overview.overview(heatmap, slots, [], 8, 19, shown=shown)

    (facet,) = figure["traces"]
    each = overview.layers_a_row(slots)
    assert (each > 1, height < 900) == (True, True)
    row = 801 // each
    assert facet["about"]["names"][row].startswith("blocks.400.mlp.fc2")
    assert facet["y"][row] == row * each + (each - 1) / 2  # rows are counted in layers, as the axis is
    drawn = facet["z"]["$fixed"].astype(np.float64)
    assert np.argwhere(drawn[:, 1] != drawn[:, 0]).tolist() == [[row]]
    found = overview.clicked(shown, slots, facet["about"]["slots"][row], 1)
    assert found is not None
    assert found.slot == 801 + worse


def test_a_tick_changes_no_old_column_when_what_is_usual_moves() -> None:
    grid = np.zeros((1200, 41))
    grid[5, 20:] = 7
    slots = [a_slot(i) for i in range(1200)]
    live = heatmaps.LiveHeatMaps(1, ("scale_exp2",), 0, None)

    def drawn(columns: int) -> Any:
        heatmap = HeatMap("scale_exp2", 1, 0, np.arange(1200), grid[:, :columns], grid[:, :columns])
        shown = overview.made_ready(heatmap, slots, live.usual_range(heatmap))
        (facet,) = overview.overview(heatmap, slots, [], 0, columns, shown=shown)[0]["traces"]
        return facet["z"]["$fixed"]

    assert [np.median(grid[5, :columns]) for columns in (39, 41)] == [0, 7]
    np.testing.assert_array_equal(drawn(39), drawn(41)[:, :39])


def test_the_mode_of_each_row_is_the_smallest_of_the_most_frequent() -> None:
    rows = np.array([[3.0, 4, 4, 3, np.nan], [-7, -7, -9.2, 1, 1], [np.nan] * 5, [0, 0, 0, 2, 2]])

    np.testing.assert_array_equal(scales.modes(rows), [3, -7, np.nan, 0])


def test_many_layers_are_two_bands_and_the_ends_stay_lines() -> None:
    blocks = 60
    slots = [a_slot(i, f"blocks.{i}.fc1") for i in range(blocks)]
    grid = np.tile(np.arange(blocks, dtype=np.float64)[:, None], (1, 5))
    grid[30, 2] = -40  # one layer, once
    heatmap = HeatMap("scale_exp2", 1, 0, np.arange(blocks), grid, grid)

    figure, _ = scales.over_steps(heatmap, scales.places(heatmap, slots), 0, 4)

    by_name = {trace["about"]["name"]: trace["y"].tolist() for trace in figure["traces"]}
    assert len(figure["traces"]) == 7
    assert by_name["lowest"] == [0, 0, -40, 0, 0]
    assert by_name["highest"] == [59] * 5
    assert by_name["1/4"][0] == 15
    assert (by_name["blocks.0.fc1"], by_name["blocks.59.fc1"]) == ([0] * 5, [59] * 5)


def test_a_rank_that_computes_something_else_is_named() -> None:
    steps, ones = np.arange(10), np.ones(10)
    spread = Spread(
        *(steps, steps, ones, np.array([0, 1] * 5), steps, 8 * ones, np.full(10, 3), steps, ones), median_error=0.0
    )
    bits = Series(steps, steps, steps, {"spread": ones}, {"spread": np.array([3.0] * 8 + [4, 3])})
    each = Ranks(np.arange(4), steps, steps, np.tile(ones, (4, 1)), np.stack([ones, ones, ones, 8 * ones]))
    found = ranks.RankValues(spread, bits, each)

    figure, _ = ranks.ranks_figure(found, 0, 9, 4)

    assert ranks.verdict(found) == "rank 3 is the largest everywhere; farthest apart at step 8: 4 bits"
    lines = {trace["about"]["name"]: trace for trace in figure["traces"]}
    assert list(lines) == ["smallest", "largest", "rank 0", "rank 1", "rank 2", "rank 3", "spread"]
    assert lines["rank 3"]["y"].tolist() == [3.0] * 10  # log2
    assert lines["largest"]["about"]["ranks"] == [3] * 10


def test_of_ranks_that_are_equal_none_is_named() -> None:
    steps, ones, zeros = np.arange(10), np.ones(10), np.zeros(10, np.int64)
    spread = Spread(*(steps, steps, ones, zeros, steps, ones, zeros, steps, ones), median_error=0.0)
    bits = Series(steps, steps, steps, {"spread": 0 * ones}, {"spread": 0 * ones})
    each = Ranks(np.arange(2), steps, steps, np.ones((2, 10)), np.ones((2, 10)))

    assert ranks.verdict(ranks.RankValues(spread, bits, each)) == "all ranks are equal"


def test_of_many_ranks_only_the_band_is_drawn() -> None:
    steps, ones = np.arange(3), np.ones(3)
    spread = Spread(*(steps, steps, ones, steps, steps, ones, steps, steps, ones), median_error=0.0)
    bits = Series(steps, steps, steps, {"spread": ones}, {"spread": ones})
    each = Ranks(np.arange(64), steps, steps, np.ones((64, 3)), np.ones((64, 3)))

    figure, _ = ranks.ranks_figure(ranks.RankValues(spread, bits, each), 0, 2, None)

    assert [trace["about"]["name"] for trace in figure["traces"]] == ["smallest", "largest", "spread"]


def test_ranking_puts_nan_before_overflow_before_underflow_and_lists_a_slot_once() -> None:
    maps = [
        a_map("nonfinite", [[0, 0, 0], [0, 0, 0.1], [0, 0, 0]]),
        a_map("overflow", [[0, 0.2, 0.3], [0, 0, 0.9], [0, 0, 0]]),
        a_map("underflow", [[0.5, 0.5, 0.5], [0, 0, 0], [0.1, 0.1, 0.1]]),
    ]

    ranked = ranking.worst(maps, [a_slot(0), a_slot(1), a_slot(2)], recent_steps=4, limit=9)

    assert [(entry.slot.slot, entry.what, entry.share) for entry in ranked] == [
        (1, "NaN, Inf", 0.1),
        (0, "overflow", 0.3),
        (2, "underflow", 0.1),
    ]
    assert ranked[1].since == "since step 12"


def test_layers_are_grouped_by_block_in_model_order() -> None:
    layers = ["embed", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "lm_head"]

    blocks = panels.blocks_of(layers)

    assert blocks == [
        ("embed", [""]),
        ("blocks.0", ["attn.qkv", "mlp.fc1"]),
        ("blocks.1", ["mlp.fc1"]),
        ("lm_head", [""]),
    ]


def test_sparkline_keeps_a_single_spike_among_many_columns() -> None:
    values = np.zeros(500)
    values[237] = 1.0

    assert max(v for v in panels.spark(values) if v is not None) == 1.0


def test_only_new_columns_travel() -> None:
    matrix = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    matrix[3, :40] = np.nan
    first = message.changed(None, {"z": matrix}, height=9)
    grown = np.hstack([matrix, np.ones((50, 2), np.float32)])
    grown[:, 299] = 7  # the column that was not complete

    same = message.changed(first, {"z": matrix.copy()}, height=9)
    second = message.changed(first, {"z": grown}, height=9)

    assert (same.version, same.message) == (first.version, {"frame": None, "arrays": {}})
    assert (first.base, second.base) == (None, first.version)
    assert second.message["frame"] is None
    z = second.message["arrays"][".z"]
    assert (z["keep"], z["shape"]) == (299, (50, 302))
    added = np.frombuffer(base64.b64decode(z["base64"]), np.float32).reshape(50, 3)
    np.testing.assert_array_equal(np.hstack([matrix[:, :299], added]), grown)


def test_another_set_of_rows_travels_whole() -> None:
    first = message.changed(None, {"z": np.zeros((5, 9), np.float32)}, height=9)

    second = message.changed(first, {"z": np.zeros((4, 9), np.float32)}, height=9)

    assert second.message["arrays"][".z"]["keep"] == 0
    assert second.version != first.version


def applied(old: Any, change: dict[str, Any]) -> Any:
    """What panel.js makes of a patch."""
    if "is" in change:
        return change["is"]
    new = list(old) if isinstance(old, list) else dict(old)
    for key, inside in change["in"].items():
        at = int(key) if isinstance(new, list) else key
        new[at] = applied(new[at] if isinstance(new, list) or at in new else None, inside)
    for key in change.get("out", []):
        del new[key]
    return new


@pytest.mark.parametrize(
    ("old", "new", "sent"),
    [
        (
            {"a": [1, {"b": 2}], "c": 3},
            {"a": [1, {"b": 5}], "c": 3},
            {"in": {"a": {"in": {"1": {"in": {"b": {"is": 5}}}}}}},
        ),
        ({"a": 1, "b": 2}, {"b": 2, "d": [1]}, {"in": {"d": {"is": [1]}}, "out": ["a"]}),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, {"in": {"a": {"is": [1, 2, 3]}}}),
        ({"a": 0}, {"a": False}, {"in": {"a": {"is": False}}}),
        ({"a": [1]}, {"a": [1]}, None),
    ],
)
def test_of_a_figures_frame_only_what_changed_travels(old: Any, new: Any, sent: Any) -> None:
    change = message.patch(old, new)

    assert change == sent
    assert change is None or applied(old, change) == new


def test_fixed_point_numbers_keep_missing_and_zero_apart() -> None:
    codes = overview.fixed(np.array([[np.nan, -99.0, -3.21, 28.0, 500.0]]), 200)

    assert codes.dtype == np.int16
    assert codes.tolist() == [[overview.MISSING, overview.ZERO, -642, 5600, 32767]]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["blocks.0.attn.qkv", "blocks.11.mlp.fc1", "lm_head"]),
        ("mlp", ["blocks.11.mlp.fc1"]),
        ("blocks.?.*", ["blocks.0.attn.qkv"]),
        (r"/^blocks\.\d+\.(attn|mlp)/", ["blocks.0.attn.qkv", "blocks.11.mlp.fc1"]),
        ("/^(a+)+$/", []),
    ],
)
def test_a_filter_is_a_glob_a_part_or_a_regular_expression(pattern: str, found: list[str]) -> None:
    slots = [a_slot(i, name) for i, name in enumerate(["blocks.0.attn.qkv", "blocks.11.mlp.fc1", "lm_head"])]

    assert [slot.layer for slot in names.matching(slots, pattern)] == found


def test_a_regular_expression_that_backtracks_elsewhere_ends_at_once() -> None:
    slots = [a_slot(0, "a" * 5000 + "!")]

    assert names.matching(slots, "/^(a|a)*$/") == []  # re would try 2**5000 ways
    with pytest.raises(ValueError, match="not a regular expression"):
        names.matching(slots, "/(/")


def test_the_tree_has_modules_in_model_order_and_filters_that_name_them() -> None:
    layers = ["model.blocks.0.attn.qkv", "model.blocks.0.mlp.fc1", "model.blocks.1.mlp.fc1", "lm_head"]

    model, head = names.tree(layers)

    assert (model.name, model.layers, head.pattern) == ("model.blocks", 3, "lm_head")
    assert [(node.name, node.layers, node.pattern) for node in model.inside.values()] == [
        ("0", 2, "model.blocks.0.*"),
        ("1.mlp.fc1", 1, "model.blocks.1.mlp.fc1"),
    ]
    slots = [a_slot(i, name) for i, name in enumerate(layers)]
    assert [slot.layer for slot in names.matching(slots, "model.blocks.0.*")] == layers[:2]


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"go": 3},
        {"go": {"params": 1}},
        {"click": {"slot": "x"}},
        {"zoom": {"from": "a"}},
        {"acknowledge": {"findings": 1}},
    ],
)
def test_what_the_browser_reports_is_checked(result: dict[str, Any]) -> None:
    assert list(panel._events(result)) == []


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ("300-420", (300, 420)),
        ("420-300", (300, 420)),
        ("300-", (300, None)),
        ("-9", (None, 9)),
        ("", (None, None)),
        ("x-3", (None, None)),
        ("1-2-3", (None, None)),
    ],
)
def test_range_of_an_address(written: str, steps: tuple[int | None, int | None]) -> None:
    assert links.parse_range(written) == steps


def test_an_address_survives_a_round_trip() -> None:
    where = links.Where("llm/gpt", "blocks.0.x", Role.WEIGHT, "overflow", 3, None, "blocks.*", 17)

    assert links.parse(where.params()) == where
    compared = links.Where(view="findings", runs=("a,b", "llm/ü"), show="open", sort="-step")
    assert links.parse(compared.params()) == compared
    assert links.parse(links.Where(run="gpt").params()) == links.Where(run="gpt")
    assert links.Where(run="gpt").params() == {"run": "gpt"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (1234.5, "1\u2009234"),
        (0.012345, "0.0123"),
        (-2.5, "−2.5"),
        (3e-7, "3.00·10⁻⁷"),
        (float("nan"), "–"),
    ],
)
def test_numbers_have_three_significant_digits(value: float, words: str) -> None:
    assert text.number(value) == words


def test_shares_and_powers_read_as_people_say_them() -> None:
    assert [text.share(v) for v in (0.0, 0.004, 2e-6, 1.0)] == ["0", "0.4 %", "2 ppm", "100 %"]
    assert [text.exp2(v) for v in (-9.0, 0.5)] == ["2⁻⁹", "2^0.5"]
    assert [text.duration(s) for s in (3, 61, 7300, 90000)] == ["3 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]


def test_a_curve_is_interrupted_where_nothing_was_recorded() -> None:
    step = np.array([0, 1, 2, 3, 40, 41])

    gaps = panels.gaps_of(step, step)
    x, values = panels.with_gaps(step.astype(np.float64), np.arange(6.0), gaps)

    assert x.tolist() == [0, 1, 2, 3, 3.5, 39.5, 40, 41]
    np.testing.assert_array_equal(values, [0, 1, 2, 3, np.nan, np.nan, 4, 5])
    assert panels.gaps_of(np.arange(0, 90, 10), np.arange(0, 90, 10)).size == 0


def test_a_band_has_no_height_where_an_edge_is_missing() -> None:
    low, high = panels.flat_where_missing(np.array([1.0, np.nan, 3.0]), np.array([2.0, np.nan, 4.0]))

    np.testing.assert_array_equal(high - low, [1, 0, 1])


def test_the_density_of_magnitudes_lies_at_their_powers_of_two() -> None:
    counts = np.zeros((256, 2), np.int64)
    counts[127 - 3, 0], counts[127 + 1, 0], counts[0, 1] = 900, 100, 50  # 2**-3, 2, and only zeros

    trace = tensor.density(Histograms(np.array([0, 8]), np.array([7, 15]), np.array([1, 1]), counts), "y2")

    assert trace["y"].tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5]
    np.testing.assert_allclose(trace["z"][[0, 4], 0], np.log10([0.9, 0.1]), rtol=1e-6)
    assert np.isnan(trace["z"][1:4]).all()
    assert np.isnan(trace["z"][:, 1]).all()
