"""Which steps are recorded: the rhythm, bursts after trouble, what the collector asks for; and presets."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fp8core
import fp8scope_agent as fp8scope
from fake_collector import Behaviour, FakeCollector
from fp8core.records import Role
from fp8scope_agent.sampling import PRESETS, Sampler, Sampling
from fp8scope_protos.v1 import telemetry_pb2 as pb

LAYERS = ["a.fc1", "a.fc1", "a.fc2", "b.fc1"]
Train = Callable[..., list[float]]


def plans(sampler: Sampler, steps: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each of the next steps, the slots whose rows, and whose histograms, are kept."""
    rows, histograms = [], []
    for _ in range(steps):
        plan = sampler.next()
        assert plan.record == plan.rows.any()
        assert plan.take_histograms == plan.histograms.any()
        assert not (plan.histograms & ~plan.rows).any()
        rows.append(np.flatnonzero(plan.rows).tolist())
        histograms.append(np.flatnonzero(plan.histograms).tolist())
    return rows, histograms


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


ALL: list[int] = [0, 1, 2, 3]


def test_the_rhythm_begins_with_the_first_step_and_a_histogram_brings_its_rows() -> None:
    sampler = Sampler(Sampling(every=3, histogram_every=4, burst=0), LAYERS)

    rows, histograms = plans(sampler, 13)

    assert [step for step in range(13) if rows[step] == ALL] == [0, 3, 4, 6, 8, 9, 12]
    assert [step for step in range(13) if histograms[step] == ALL] == [0, 4, 8, 12]
    assert [slots for slots in rows + histograms if slots not in ([], ALL)] == []


def test_without_histograms_there_are_none() -> None:
    sampler = Sampler(Sampling(every=1, histogram_every=0, burst=0), LAYERS)

    assert plans(sampler, 5) == ([ALL] * 5, [[]] * 5)


def test_after_trouble_the_tensor_is_recorded_at_each_step_with_one_histogram() -> None:
    sampler = Sampler(Sampling(every=10, histogram_every=0, burst=4), LAYERS)
    plans(sampler, 1)

    sampler.trouble(np.array([1, 2]))
    rows, histograms = plans(sampler, 20)

    assert rows == [[1, 2]] * 4 + [[]] * 5 + [ALL] + [[]] * 9 + [ALL]
    assert histograms == [[1, 2]] + [[]] * 19


def test_a_tensor_that_clips_all_the_time_has_a_burst_now_and_then() -> None:
    sampler = Sampler(Sampling(every=1000, histogram_every=0, burst=4), LAYERS)
    taken = []

    for step in range(200):
        plan = sampler.next()
        if plan.record:
            sampler.trouble(np.array([0]))
        taken += [step] if plan.take_histograms else []

    # Rows are recorded 5 times of the first 1000 steps' rhythm and burst; nothing sees the trouble after that.
    assert taken == [1]

    sampler = Sampler(Sampling(every=1, histogram_every=0, burst=4), LAYERS)
    taken = []
    for step in range(200):
        taken += [step] if sampler.next().take_histograms else []
        sampler.trouble(np.array([0]))

    assert taken == [1, 41, 81, 121, 161]


def test_bursts_of_many_tensors_follow_one_another() -> None:
    sampler = Sampler(Sampling(every=1, histogram_every=0, burst=4), LAYERS)
    taken = []

    for step in range(20):
        taken += [(step, np.flatnonzero(plan.histograms).tolist())] if (plan := sampler.next()).take_histograms else []
        sampler.trouble(np.array([step % 4]))

    assert taken == [(1, [0]), (6, [1]), (11, [2]), (16, [3])]


def test_a_request_is_honoured_for_its_layers_and_its_time_and_once() -> None:
    sampler = Sampler(Sampling(every=100, histogram_every=0, burst=0), LAYERS)
    plans(sampler, 1)
    often = pb.Request(id=1, layers=["a.*"], sample_every=pb.SampleEvery(steps=2, for_steps=6))
    histograms = pb.Request(id=2, layers=["*.fc2", "b.fc?"], take_histograms=pb.TakeHistograms(count=2))

    sampler.ask([often, histograms, often])
    sampler.ask([often, histograms])
    rows, taken = plans(sampler, 10)

    assert rows == [ALL, [2, 3], [0, 1, 2], [], [0, 1, 2], [], [], [], [], []]
    assert taken == [[2, 3], [2, 3]] + [[]] * 8


@pytest.mark.parametrize(
    "request_",
    [
        pb.Request(id=1),
        pb.Request(id=1, layers=["nothing"], take_histograms=pb.TakeHistograms(count=3)),
        pb.Request(id=1, take_histograms=pb.TakeHistograms(count=0)),
        pb.Request(id=1, sample_every=pb.SampleEvery(steps=0, for_steps=10)),
        pb.Request(id=1, sample_every=pb.SampleEvery(steps=1, for_steps=0)),
        pb.Request.FromString(pb.Request(id=1).SerializeToString() + b"\xa2\x06\x03abc"),  # a kind of the future
    ],
)
def test_a_request_that_means_nothing_here_is_ignored(request_: pb.Request) -> None:
    sampler = Sampler(Sampling(every=100, histogram_every=0, burst=0), LAYERS)

    sampler.ask([request_])

    assert plans(sampler, 5) == ([ALL, [], [], [], []], [[]] * 5)


def test_requests_without_end_or_number_stay_bounded() -> None:
    sampler = Sampler(Sampling(every=1, histogram_every=0, burst=0), LAYERS)
    forever = pb.SampleEvery(steps=1, for_steps=2**32 - 1)

    sampler.ask(pb.Request(id=number, sample_every=forever) for number in range(5000))

    assert len(sampler._wishes) <= 32
    assert len(sampler._ids) <= 1024
    assert all(wish.until <= 100_001 for wish in sampler._wishes)


def test_presets_are_what_the_table_says() -> None:
    assert {name: (p.every, p.histogram_every, p.burst) for name, p in PRESETS.items()} == {
        "economy": (10, 1000, 16),
        "standard": (1, 100, 16),
        "full": (1, 10, 64),
    }


def test_the_histograms_that_arrive_are_those_of_the_tensors(model: nn.Module, collector: FakeCollector) -> None:
    x_BK = torch.randn(8, 16, generator=torch.Generator().manual_seed(3)) * 10.0
    with fp8scope.attach(model, run="r", collector=collector.address, every=2, histogram_every=3, burst=0) as monitor:
        for _ in range(7):
            model(x_BK).square().mean().backward()
            monitor.step()
    collector.wait_for(lambda source: source.finish is not None)

    source = collector.source
    weight = fp8core.exponent_histogram(model[0].weight).numpy()  # type: ignore[arg-type]
    assert sorted({step for step, _ in source.rows}) == [0, 2, 3, 4, 6]
    assert sorted(source.histograms) == [(step, slot) for step in (0, 3, 6) for slot in range(6)]
    for step in (0, 3, 6):
        assert source.histograms[step, 0].tolist() == fp8core.exponent_histogram(x_BK).tolist()
        assert source.histograms[step, 1].tolist() == weight.tolist()
        for slot in range(6):
            assert source.histograms[step, slot].sum() == source.rows[step, slot]["numel"]
    assert monitor.snapshot().histograms_recorded == 18
    assert source.drops == {}


def test_a_tensor_that_clips_is_looked_at_closely_in_the_next_steps(collector: FakeCollector) -> None:
    torch.manual_seed(0)
    recipe = fp8core.ConstantScaling(scale_exp2=4)
    model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), recipe=recipe)
    with fp8scope.attach(model, run="r", collector=collector.address, every=5, histogram_every=0, burst=2) as monitor:
        for step in range(12):
            x_BK = torch.randn(8, 16) * (1000.0 if step >= 5 else 1.0)
            model(x_BK).square().mean().backward()
            model.zero_grad()
            monitor.step()
            if step == 5:
                wait_until(lambda: bool(monitor._sampler._wishes))  # the drain has seen it; step 6 is planned already
    collector.wait_for(lambda source: source.finish is not None)

    source = collector.source
    clipped = {slot for (step, slot), row in source.rows.items() if step == 5 and row["overflow"]}
    assert 0 in clipped
    assert {slot for step, slot in source.rows if step == 7} == clipped
    assert {slot for step, slot in source.rows if step == 8} == clipped
    assert {step for step, _ in source.rows} == {0, 5, 7, 8, 10}
    assert set(source.histograms) == {(7, slot) for slot in clipped}


def test_a_request_reaches_the_training_process_and_is_honoured_once(
    model: nn.Module, collector: FakeCollector, train: Train
) -> None:
    collector.behaviour = Behaviour(
        requests=[pb.Request(id=3, layers=["2"], take_histograms=pb.TakeHistograms(count=2))]
    )
    with fp8scope.attach(model, run="r", collector=collector.address, histogram_every=0) as monitor:
        train(model, monitor, 2)
        wait_until(lambda: bool(monitor._sampler._wishes), timeout_s=30.0)  # sent, answered, and read by the drain
        look = monitor._drain._next_look
        train(model, monitor, 4)
        wait_until(lambda: monitor._drain._next_look > look)  # it has read the same request again
        train(model, monitor, 4)
    source = collector.wait_for(lambda source: source.finish is not None)

    assert {slot for _, slot in source.histograms} == {3, 4, 5}
    assert len({step for step, _ in source.histograms}) == 2
    assert {monitor._tap.slots[slot].role for _, slot in source.histograms} == set(Role)


def test_only_chosen_layers_are_recorded(model: nn.Module, collector: FakeCollector, train: Train) -> None:
    with fp8scope.attach(model, run="r", collector=collector.address, include=["*"], exclude=["0"]) as monitor:
        train(model, monitor, 2)
    source = collector.wait_for(lambda source: source.finish is not None)

    assert [slot.layer for slot in source.open.slots] == ["2", "2", "2"]
    assert sorted(source.rows) == [(step, slot) for step in range(2) for slot in range(3)]
