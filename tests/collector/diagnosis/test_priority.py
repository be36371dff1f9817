"""How diagnosis yields to ingest: by how much it would take to follow, and a thread that takes only what is left."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp8scope_collector.diagnosis import worker
from fp8scope_collector.diagnosis.live import RUN_BUDGET_S, News, Watcher
from fp8scope_collector.diagnosis.priority import Demand, step_aside
from fp8scope_collector.diagnosis.settings import Settings
from fp8scope_collector.storage.engine import migrate, open_engine


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_following_takes_does_not_depend_on_how_long_diagnosis_rested() -> None:
    for rest_s in (1.0, 20.0):
        clock = Clock()
        demand = Demand(clock)
        assert (demand.cores, demand.late_s) == (0.0, 0.0)

        clock.now += 1 + rest_s  # 100 steps a second came, of which a look of one second judged 50
        demand.looked(round(100 * clock.now), 50, used_s=1.0)

        assert demand.cores == pytest.approx(2.0)
        assert demand.late_s == pytest.approx((100 * clock.now - 50) / 100)


def test_when_rows_come_no_longer_diagnosis_is_not_late_and_a_look_that_judges_nothing_says_nothing() -> None:
    clock = Clock()
    demand = Demand(clock)
    clock.now = 1.0
    demand.looked(100, 50, 0.25)
    assert demand.cores == pytest.approx(0.5)

    clock.now = 2.0
    demand.looked(200, 20, 9.0)  # it began again: rows came late
    assert demand.cores == pytest.approx(0.5)

    clock.now = 3.0
    demand.came(200)
    assert (demand.cores, demand.late_s) == (0.0, 0.0)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux has it")
def test_a_thread_that_steps_aside_leaves_the_others_as_they_are() -> None:
    with ThreadPoolExecutor(1, initializer=step_aside) as aside:
        policy = aside.submit(lambda: os.sched_getscheduler(threading.get_native_id())).result()

    assert policy == os.SCHED_IDLE
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(("cores", "late_s", "aside"), [(0.6, 16.0, True), (0.4, 16.0, False), (0.6, 14.0, False)])
def test_where_half_a_core_could_not_follow_and_findings_are_late_diagnosis_steps_aside_and_else_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: float, late_s: float, aside: bool
) -> None:
    url, stop = f"sqlite:///{tmp_path}/test.db", threading.Event()
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()
    looks: list[tuple[bool, float]] = []

    def look(_: Watcher, __: object, budget_s: float) -> tuple[list[News], bool]:
        looks.append((threading.current_thread() is not threading.main_thread(), budget_s))
        if len(looks) == 3:
            stop.set()
        return [], True

    monkeypatch.setattr(Watcher, "look", look)
    monkeypatch.setattr(Demand, "cores", cores)
    monkeypatch.setattr(Demand, "late_s", late_s)
    monkeypatch.setattr(worker, "step_back", lambda: None)

    worker.work(Settings(url, 1.0, None), stop)

    assert looks == [(False, RUN_BUDGET_S), *2 * [(aside, 0.0 if aside else RUN_BUDGET_S)]]
