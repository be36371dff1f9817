"""A monitor records what the layers wrote, leaves the training alone, and never lets its own troubles reach it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fp8core
import fp8scope_agent as fp8scope
from fake_collector import Behaviour, FakeCollector, Source
from fp8core.records import Role
from fp8scope_agent.adapters import native
from fp8scope_agent.adapters.tap import bind
from fp8scope_agent.ring import DEPTH, Frame, Ring
from fp8scope_agent.spool import SpoolReader, spool_bytes, waiting
from fp8scope_protos.v1 import telemetry_pb2 as pb

Train = Callable[..., list[float]]
Warnings = Callable[[], list[str]]

NOBODY = "127.0.0.1:1"  # no collector listens there


def attach(model: nn.Module, collector: FakeCollector | str, **arguments: object) -> fp8scope.Monitor:
    address = collector if isinstance(collector, str) else collector.address
    return fp8scope.attach(model, **{"run": "run", "collector": address, **arguments})  # type: ignore[arg-type]


def drained(monitor: fp8scope.Monitor, step: int, timeout_s: float = 10.0) -> fp8scope.Snapshot:
    """The snapshot when the drain thread has recorded `step`."""
    deadline = time.monotonic() + timeout_s
    while monitor.snapshot().step != step:
        assert time.monotonic() < deadline, monitor.snapshot()
        time.sleep(0.005)
    return monitor.snapshot()


def spooled(folder: str | None) -> list[pb.ClientMessage]:
    assert folder is not None
    reader = SpoolReader(Path(folder))
    return [pb.ClientMessage.FromString(record.payload) for record in iter(reader.next, None)]


def test_every_slot_of_every_step_arrives_with_its_numbers(
    model: nn.Module, collector: FakeCollector, train: Train
) -> None:
    monitor = attach(model, collector, project="p", tags=["a"], notes="n", config={"lr": 0.1}, rank=2, world_size=4)
    losses = train(model, monitor, 10)
    monitor.close()

    source = collector.source
    assert sorted(source.rows) == [(step, slot) for step in range(10) for slot in range(6)]
    assert source.duplicate_rows == 0
    assert [source.scalars["loss", step] for step in range(10)] == losses
    assert (source.open.project, source.open.run, source.open.rank, source.open.world_size) == ("p", "run", 2, 4)
    assert (list(source.open.tags), source.open.notes, source.open.config_json) == (["a"], "n", '{"lr": 0.1}')
    assert source.finish is not None
    assert source.finish.outcome == pb.OUTCOME_FINISHED
    assert source.finish.last_step == 9
    assert monitor.snapshot().rows_sent == monitor.snapshot().rows_recorded == 60
    assert monitor.snapshot().rows_dropped == {}


def test_the_rows_are_the_statistics_of_the_tensors(model: nn.Module, collector: FakeCollector) -> None:
    x = torch.randn(8, 16)
    with attach(model, collector) as monitor:
        model(x).square().mean().backward()
        monitor.step()

    rows = collector.source.rows
    first, second = model[0], model[2]
    assert rows[0, 0]["amax"] == x.abs().max().item()
    assert rows[0, 0]["numel"] == x.numel()
    assert rows[0, 1]["amax"] == first.weight.abs().max().item()
    assert rows[0, 1]["sum_sq"] == pytest.approx(first.weight.double().square().sum().item(), rel=1e-5)
    assert rows[0, 3]["numel"] == 8 * second.in_features
    assert rows[0, 5]["numel"] == 8 * second.out_features


def test_slots_are_numbered_in_the_order_of_the_model(model: nn.Module, collector: FakeCollector) -> None:
    attach(model, collector).close()

    slots = collector.source.open.slots
    assert [(slot.slot, slot.layer, slot.role) for slot in slots] == [
        (layer * 3 + role, name, role + 1) for layer, name in enumerate(["0", "2"]) for role in range(3)
    ]
    assert [slot.format for slot in slots] == ["E4M3FN", "E4M3FN", "E5M2"] * 2
    assert [slot.margin for slot in slots] == [0, 0, 3] * 2
    assert (slots[0].in_features, slots[0].out_features, slots[0].module_class) == (16, 32, "Fp8Linear")
    assert slots[0].recipe == repr(fp8core.AmaxScaling())


def test_a_wrapper_around_a_module_does_not_change_the_names_of_its_layers(model: nn.Module) -> None:
    compiled = nn.ModuleDict({"_orig_mod": model})  # as torch.compile(model) names its parts
    wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_checkpoint_wrapped_module": compiled})})

    layers = [slot.layer for slot in bind(wrapped, [native.find]).slots[::3]]

    assert layers == ["module.0", "module.2"]


def test_micro_batches_of_one_step_are_one_row(model: nn.Module, collector: FakeCollector, train: Train) -> None:
    with attach(model, collector) as monitor:
        train(model, monitor, 2, micro_batches=3)

    rows = collector.source.rows
    assert len(rows) == 12
    assert rows[1, 0]["numel"] == 3 * 8 * 16  # input: summed
    assert rows[1, 1]["numel"] == 16 * 32  # weight: as it is
    assert rows[1, 2]["numel"] == 3 * 8 * 32  # grad_output: summed


def test_an_evaluation_between_steps_leaves_no_trace(model: nn.Module, collector: FakeCollector) -> None:
    with attach(model, collector) as monitor:
        model(torch.randn(8, 16)).sum().backward()
        model.eval()
        with torch.no_grad():
            model(1000 * torch.randn(64, 16))
        model.train()
        monitor.step()

    assert collector.source.rows[0, 0]["numel"] == 8 * 16
    assert collector.source.rows[0, 0]["amax"] < 100


def test_a_layer_that_did_not_run_has_no_row(model: nn.Module, collector: FakeCollector) -> None:
    with attach(model, collector) as monitor:
        model[0](torch.randn(8, 16))
        monitor.step()
        monitor.step(loss=1.0)

    assert sorted(collector.source.rows) == [(0, 0), (0, 1)]
    assert collector.source.scalars == {("loss", 1): 1.0}


def test_the_loss_curve_is_the_same_with_and_without_the_agent(
    make_model: Callable[[], nn.Module], collector: FakeCollector, train: Train
) -> None:
    alone = make_model()
    losses = train(alone, None, 50)
    watched = make_model()
    with attach(watched, collector) as monitor:
        watched_losses = train(watched, monitor, 50)

    assert watched_losses == losses
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True))


def test_steps_can_be_numbered_by_the_user(model: nn.Module, collector: FakeCollector, warnings_of: Warnings) -> None:
    x = torch.randn(8, 16)
    with attach(model, collector) as monitor:
        for step in (100, 110, 105, None, -3, 2.5, 200, 200):
            model(x)
            monitor.step(step)  # type: ignore[arg-type]

    assert sorted({step for step, _ in collector.source.rows}) == [100, 110, 111, 200]
    assert collector.source.drops == {"step_refused": 4 * 6}
    assert len([sentence for sentence in warnings_of() if "step 105 came after step 110" in sentence]) == 1


def test_only_every_nth_step_is_recorded_but_all_scalars(
    model: nn.Module, collector: FakeCollector, train: Train
) -> None:
    with attach(model, collector, every=4) as monitor:
        train(model, monitor, 10)

    assert sorted({step for step, _ in collector.source.rows}) == [0, 4, 8]
    assert collector.source.rows[4, 0]["numel"] == 8 * 16  # of step 4 alone
    assert len(collector.source.scalars) == 10


def test_scalars_keep_their_values_whatever_they_are(
    model: nn.Module, collector: FakeCollector, warnings_of: Warnings
) -> None:
    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus_inf": torch.tensor(-math.inf),
        "minus_zero": -0.0,
        "tiny": 5e-324,
        "bf16": torch.tensor(0.1, dtype=torch.bfloat16),
        "grad": torch.tensor([[2.5]], requires_grad=True),
        "int": torch.tensor(7),
        "numpy": np.float32(0.25),
        "true": True,
    }
    refused = {
        "vector": torch.zeros(2),
        "text": "high",
        "none": None,
        "complex": torch.tensor(1j),
        "": 1.0,
        "a\nb": 2.0,
    }
    with attach(model, collector) as monitor:
        monitor.step(**values, **refused)  # type: ignore[arg-type]

    stored = {name: value for (name, _), value in collector.source.scalars.items()}
    assert {name: repr(value) for name, value in stored.items()} == {
        name: repr(float(value.detach()) if isinstance(value, torch.Tensor) else float(value))
        for name, value in values.items()
    }
    assert collector.source.drops == {"scalar_refused": len(refused)}
    assert len(warnings_of()) == len(refused)


def test_a_nonfinite_loss_and_tensor_are_recorded(model: nn.Module, collector: FakeCollector) -> None:
    x = torch.randn(8, 16)
    x[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    with attach(model, collector) as monitor:
        loss = model(x).sum()
        monitor.step(loss=loss)

    assert collector.source.rows[0, 0]["nonfinite"] == 3
    assert math.isnan(collector.source.scalars["loss", 0])


def test_more_scalars_than_a_step_may_have_are_counted(
    model: nn.Module, collector: FakeCollector, warnings_of: Warnings
) -> None:
    with attach(model, collector) as monitor:
        monitor.step(**{f"s{index}": float(index) for index in range(70)})

    assert len(collector.source.scalars) == 64
    assert collector.source.drops == {"too_many_scalars": 6}
    assert len(warnings_of()) == 1


def test_a_model_without_fp8_layers_sends_its_scalars_and_a_hint(
    collector: FakeCollector, warnings_of: Warnings
) -> None:
    with attach(nn.Linear(4, 4), collector) as monitor:
        for step in range(5):
            monitor.step(loss=float(step))

    assert collector.source.rows == {}
    assert [collector.source.scalars["loss", step] for step in range(5)] == [0, 1, 2, 3, 4]
    assert monitor.snapshot().worst_layer is None
    assert [sentence for sentence in warnings_of() if "convert_to_fp8" in sentence] == warnings_of()


def test_the_snapshot_names_the_tensor_that_is_closest_to_clipping(model: nn.Module, collector: FakeCollector) -> None:
    fp8core.convert_to_fp8(model, recipe=fp8core.ConstantScaling(scale_exp2=0))
    model[0].set_recipe(fp8core.ConstantScaling(scale_exp2=0), fp8core.HYBRID)
    model[2].set_recipe(fp8core.ConstantScaling(scale_exp2=0), fp8core.HYBRID)
    x = torch.zeros(8, 16)
    x[0, 0] = 896.0
    with attach(model, collector) as monitor:
        model(x)
        monitor.step()
        snapshot = drained(monitor, 0)

    assert (snapshot.worst_layer, snapshot.worst_role) == ("0", Role.INPUT)
    assert snapshot.worst_headroom == -1.0
    assert snapshot.overflow >= 1


def test_a_snapshot_before_the_first_step_is_empty(model: nn.Module) -> None:
    monitor = attach(model, NOBODY)

    snapshot = monitor.snapshot()

    monitor.close(timeout_s=0)
    assert (snapshot.step, snapshot.worst_layer, snapshot.rows_recorded, snapshot.rows_dropped) == (None, None, 0, {})


def test_when_the_ring_is_full_the_newest_step_is_dropped_and_counted(
    model: nn.Module, collector: FakeCollector, warnings_of: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    real = Ring.next

    def held(self: Ring, timeout_s: float) -> object:
        let_go.wait(20)
        return real(self, timeout_s)

    monkeypatch.setattr(Ring, "next", held)
    with attach(model, collector) as monitor:
        for _ in range(DEPTH + 3):
            model(torch.randn(8, 16)).sum().backward()
            monitor.step()
        let_go.set()
        drained(monitor, DEPTH - 1)
        model(torch.randn(8, 16)).sum().backward()
        monitor.step()

    assert sorted({step for step, _ in collector.source.rows}) == [*range(DEPTH), DEPTH + 3]
    assert collector.source.rows[DEPTH + 3, 0]["numel"] == 8 * 16  # nothing of the dropped steps is in it
    assert collector.source.drops == {"ring_full": 3 * 6}
    assert len([sentence for sentence in warnings_of() if "every=10" in sentence]) == 1


@pytest.mark.parametrize("trouble", ["absent", "hung", "silent"])
def test_steps_are_recorded_while_the_collector_is_no_use(
    model: nn.Module, collector: FakeCollector, train: Train, trouble: str
) -> None:
    collector.behaviour = Behaviour(hang=trouble == "hung", hang_after_open=trouble == "silent")
    if trouble == "absent":
        collector.die()
    monitor = attach(model, collector)

    for last in (9, 19, 29, 39, 49):  # fewer at a time than the ring has room for, whatever else this machine does
        train(model, monitor, 10)
        snapshot = drained(monitor, last)

    monitor.close(timeout_s=0)
    assert snapshot.rows_recorded == 300
    assert snapshot.rows_sent == 0
    assert snapshot.rows_dropped == {}
    assert waiting(Path(str(snapshot.spool))).rows == 300


def test_an_error_of_the_agent_switches_it_off_and_the_training_goes_on(
    model: nn.Module, collector: FakeCollector, train: Train, warnings_of: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = attach(model, collector)
    train(model, monitor, 2)

    def broken(*_: object, **__: object) -> bool:
        raise AttributeError("a bug")

    monkeypatch.setattr(Ring, "take", broken)
    losses = train(model, monitor, 3)
    monitor.close()

    assert len(losses) == 3
    assert len([sentence for sentence in warnings_of() if "switched itself off" in sentence]) == 1
    assert collector.source.drops == {"agent_error": 3 * 6}
    assert len(collector.source.rows) == 12


def test_a_frame_that_cannot_be_decoded_costs_only_itself(
    model: nn.Module, collector: FakeCollector, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8scope_agent import drain

    real, calls = drain.decode_step, [0]

    def sometimes(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            raise ValueError("a bug")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(drain, "decode_step", sometimes)
    with attach(model, collector) as monitor:
        train(model, monitor, 4)

    assert sorted({step for step, _ in collector.source.rows}) == [0, 2, 3]
    assert collector.source.drops == {"agent_error": 6}


def test_a_sender_that_cannot_be_started_costs_no_rows(
    model: nn.Module, train: Train, warnings_of: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    monitor = attach(model, NOBODY)
    train(model, monitor, 5)
    drained(monitor, 4)
    monkeypatch.setattr(sys, "executable", None)
    monitor.close(timeout_s=0)

    assert waiting(Path(str(monitor.snapshot().spool))).rows == 30
    assert len([sentence for sentence in warnings_of() if "sender process cannot be started" in sentence]) == 1


def test_a_spool_that_cannot_be_made_is_said_once_and_counted(
    model: nn.Module, train: Train, tmp_path: Path, warnings_of: Warnings
) -> None:
    (tmp_path / "file").write_text("")
    with attach(model, NOBODY, spool_dir=tmp_path / "file" / "spool") as monitor:
        train(model, monitor, 5)

    snapshot = monitor.snapshot()
    assert snapshot.rows_dropped == {"spool_error": 5 * 6 + 1, "spool_error_histograms": 6}  # and the end of the run
    assert snapshot.rows_recorded == 0
    assert snapshot.spool is None
    assert [sentence for sentence in warnings_of() if "FP8SCOPE_SPOOL_DIR" in sentence] == warnings_of()


def test_a_disk_that_was_full_is_used_again(
    model: nn.Module, collector: FakeCollector, train: Train, warnings_of: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8scope_agent import spool

    def full(file: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with attach(model, collector) as monitor:
        train(model, monitor, 2)
        drained(monitor, 1)
        with monkeypatch.context() as patch:
            patch.setattr(spool, "_write_all", full)
            train(model, monitor, 3)
            drained(monitor, 4)
        train(model, monitor, 2)

    assert sorted({step for step, _ in collector.source.rows}) == [0, 1, 5, 6]
    assert collector.source.drops == {"spool_error": 18}
    assert len([sentence for sentence in warnings_of() if "No space left" in sentence]) == 1


def test_a_spool_that_is_full_gives_up_the_oldest_and_says_so(
    model: nn.Module, train: Train, warnings_of: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp8scope_agent import config

    monkeypatch.setattr(config, "_SMALLEST_SPOOL_BYTES", 1)
    monkeypatch.setenv("FP8SCOPE_SPOOL_BYTES", "20000")
    monitor = attach(model, NOBODY)
    for start in range(0, 100, 10):
        train(model, monitor, 10)
        drained(monitor, start + 9)
    monitor.close(timeout_s=0)

    snapshot = monitor.snapshot()
    messages = spooled(snapshot.spool)
    kept = sum(message.stats.rows for message in messages)
    assert spool_bytes(Path(str(snapshot.spool))) <= 20000
    assert snapshot.rows_dropped == {"spool_full": 600 - kept, "spool_full_histograms": 6}
    assert messages[-1].finish.drops[0].rows == 600 - kept
    assert len([sentence for sentence in warnings_of() if "FP8SCOPE_SPOOL_BYTES" in sentence]) == 2


def test_troubles_of_the_sender_are_said_once_in_the_training_log(
    model: nn.Module, collector: FakeCollector, train: Train, warnings_of: Warnings
) -> None:
    collector.behaviour = Behaviour(token="right")
    with attach(model, collector, token="wrong") as monitor:
        train(model, monitor, 3)
        deadline = time.monotonic() + 15
        while monitor.snapshot().problem is None and time.monotonic() < deadline:
            time.sleep(0.05)
        snapshot = monitor.snapshot()
        collector.behaviour = Behaviour()
        monitor.close(timeout_s=20)

    assert monitor.snapshot().problem is None
    assert snapshot.problem is not None
    assert "FP8SCOPE_TOKEN" in snapshot.problem
    assert len([sentence for sentence in warnings_of() if "refuses the token" in sentence]) == 1


def test_leaving_by_an_exception_is_a_failed_run(model: nn.Module, collector: FakeCollector) -> None:
    monitor = attach(model, collector)
    with pytest.raises(RuntimeError), monitor:
        raise RuntimeError("CUDA error: out of cheese")

    finish = collector.source.finish
    assert finish is not None
    assert finish.outcome == pb.OUTCOME_FAILED
    assert finish.message == "RuntimeError: CUDA error: out of cheese"


def test_leaving_by_a_clean_exit_is_a_finished_run(model: nn.Module, collector: FakeCollector) -> None:
    with pytest.raises(SystemExit), attach(model, collector):
        raise SystemExit(0)

    assert collector.source.finish is not None
    assert collector.source.finish.outcome == pb.OUTCOME_FINISHED


def test_closing_twice_and_stepping_afterwards_do_nothing(
    model: nn.Module, collector: FakeCollector, train: Train
) -> None:
    with attach(model, collector) as monitor:
        train(model, monitor, 2)
        monitor.close()
        train(model, monitor, 2)
    monitor.close()

    assert len(collector.source.rows) == 12
    assert collector.source.finish is not None


def test_close_is_bounded_when_the_collector_hangs(
    model: nn.Module, collector: FakeCollector, train: Train, warnings_of: Warnings
) -> None:
    collector.behaviour = Behaviour(hang=True)
    monitor = attach(model, collector)
    train(model, monitor, 3)

    began = time.monotonic()
    monitor.close(timeout_s=0.5)
    took_s = time.monotonic() - began

    assert took_s < 10
    (sentence,) = [sentence for sentence in warnings_of() if "not yet at the collector" in sentence]
    assert sentence.startswith("18 rows")
    assert f"fp8scope-agent sync {monitor.snapshot().spool} --collector {collector.address}" in sentence


def test_close_is_bounded_when_the_device_hangs(
    model: nn.Module, collector: FakeCollector, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Frame, "ready", lambda self: False)
    monitor = attach(model, collector)
    train(model, monitor, 3)

    monitor.close(timeout_s=0.2)

    assert monitor.snapshot().rows_dropped == {"close_timeout": 18}


def test_after_close_the_layers_write_to_nowhere(model: nn.Module, collector: FakeCollector, train: Train) -> None:
    first = attach(model, collector, run="first")
    train(model, first, 1)
    first.close()
    words = [arena.words.clone() for arena in first._tap.arenas]
    train(model, None, 1)

    assert all(torch.equal(before, arena.words) for before, arena in zip(words, first._tap.arenas, strict=True))


def test_a_model_can_be_attached_again(model: nn.Module, collector: FakeCollector, train: Train) -> None:
    for _ in range(2):
        with attach(model, collector) as monitor:
            train(model, monitor, 3)

    sources: list[Source] = list(collector.sources.values())
    assert [source.open.incarnation for source in sources] == [1, 2]
    assert [len(source.rows) for source in sources] == [18, 18]


def test_a_second_monitor_takes_the_layers_over(model: nn.Module, collector: FakeCollector, train: Train) -> None:
    first = attach(model, collector, run="first")
    second = attach(model, collector, run="second")
    first.close()
    train(model, second, 2)
    second.close()

    assert {source.open.run: len(source.rows) for source in collector.sources.values()} == {"first": 0, "second": 12}


def test_two_ranks_of_one_run_are_two_sources(
    make_model: Callable[[], nn.Module], collector: FakeCollector, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monitors = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        model = make_model()
        monitors.append(attach(model, collector))
        train(model, monitors[-1], 5)
    for monitor in monitors:
        monitor.close()

    sources = collector.sources.values()
    assert sorted((source.open.rank, source.open.world_size, len(source.rows)) for source in sources) == [
        (0, 2, 30),
        (1, 2, 30),
    ]
    assert {source.open.incarnation for source in sources} == {1}


def test_the_environment_says_where_the_run_ran(model: nn.Module, collector: FakeCollector) -> None:
    attach(model, collector).close()

    environment = collector.source.open.environment
    assert environment["pid"] == str(os.getpid())
    assert environment["torch"] == torch.__version__
    assert environment["device"] == "cpu"
    assert set(environment) >= {"host", "python", "fp8core", "platform"}


def test_layers_without_real_weights_are_refused(collector: FakeCollector) -> None:
    with torch.device("meta"):
        model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 16)))

    with pytest.raises(ValueError, match="layer '0' is on the meta device; attach after"):
        attach(model, collector)


def test_a_snapshot_is_a_value(model: nn.Module) -> None:
    monitor = attach(model, NOBODY)
    snapshot = monitor.snapshot()
    monitor.close(timeout_s=0)

    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.step = 3  # type: ignore[misc]
