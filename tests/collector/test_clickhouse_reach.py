"""A chDB folder that cannot be used is one sentence, which says why and what to do, and is left as it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from fp8scope_collector.storage import clickhouse_reach
from fp8scope_collector.storage.clickhouse import ClickHouseStats
from fp8scope_collector.storage.clickhouse_http import OFFER, Offer, find, holder
from fp8scope_collector.storage.clickhouse_reach import Database
from fp8scope_collector.storage.stats_store import StorageError

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """What can be seen from without of a chDB folder and its offer, where any user may go."""
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        folder = Path(above) / "stats"
        folder.mkdir()
        (folder / "status").write_text("PID: 1\n")
        (folder / OFFER).write_text(json.dumps({"pid": 1, "port": 1, "password": "secret"}))
        yield folder
        folder.chmod(0o755)


def refused(folder: Path, *, changing: bool = False) -> str:
    """What is said instead of reaching it."""
    database = Database(sa.make_url(f"chdb:///{folder}"))
    try:
        with pytest.raises(StorageError) as error, database.client(changing=changing):
            pass
    finally:
        database.close()
    return str(error.value)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """As by the process that is named in it."""
    with (folder / "status").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def no_more_rights_than_modes_give() -> Iterator[None]:
    """Root becomes nobody for a while; whoever else runs the tests is bound by modes anyway."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("offer", [None, {"pid": 2, "port": 1, "password": "of one that was killed"}])
def test_a_process_that_has_the_folder_and_offers_nothing_is_named(
    folder: Path, offer: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clickhouse_reach, "PATIENCE_S", 0.1)
    (folder / OFFER).unlink()
    if offer:
        (folder / OFFER).write_text(json.dumps(offer))

    with held(folder):
        said = refused(folder)

    assert said == (
        f"statistics in chdb:///{folder} cannot be opened: a chDB folder belongs to one process at a time, and process "
        "1 has it and lets no others read: a command that changes it, or a collector that starts or ends. Try again"
    )


@pytest.mark.parametrize("changing", [False, True])
@pytest.mark.parametrize("closed", [OFFER, "status"])
def test_a_folder_that_another_users_process_has_is_explained(folder: Path, closed: str, changing: bool) -> None:
    with held(folder):
        (folder / closed).chmod(0)
        with no_more_rights_than_modes_give():
            said = refused(folder, changing=changing)

    assert said == (
        f"statistics in chdb:///{folder} are another user's, and this one may not use {folder / closed}. "
        "Run this as the user that runs the collector"
    )


def test_a_folder_that_is_another_users_and_nobody_has_is_explained(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.chmod(0o555)

    with no_more_rights_than_modes_give():
        said = refused(folder)

    assert f"are another user's, and this one may not use {folder}. Run this as" in said
    assert capfd.readouterr().err == "", "chDB was not even asked"


def test_what_is_no_folder_is_not_made_one_by_reading(folder: Path) -> None:
    none, file = folder / "none", folder / "status"

    for each in (none, file):
        assert f"there is no folder '{each}'. `fp8scope serve` makes it" in refused(each)

    assert not none.exists()


def test_a_folder_in_which_chdb_does_not_start_is_not_said_to_be_another_processs(folder: Path) -> None:
    (folder / "data").write_text("no folder")

    said = refused(folder)

    assert f"statistics in chdb:///{folder} cannot be opened: no other process has the folder, but chDB" in said
    assert f'filesystem error: in remove_all: Not a directory ["{folder}/data/' in said
    assert "Stack trace" not in said


def test_a_process_that_leaves_between_its_offer_and_the_first_question_is_not_the_readers_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stats"
    first = ClickHouseStats(sa.make_url(f"chdb:///{folder}"))
    first.migrate()
    first.close()
    holders = iter([1])
    monkeypatch.setattr(clickhouse_reach, "holder", lambda folder: next(holders, None) or holder(folder))
    gone = Offer(1, 1, "nobody listens there")
    monkeypatch.setattr(clickhouse_reach, "find", lambda folder, pid: gone if pid == 1 else find(folder, pid))

    with contextlib.closing(ClickHouseStats(sa.make_url(f"chdb:///{folder}"))) as store:
        assert store.size_bytes() == 0
