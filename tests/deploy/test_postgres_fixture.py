from __future__ import annotations

import pytest
import sqlalchemy as sa


def test_each_test_gets_an_empty_database_that_takes_tables(postgres_url: str) -> None:
    with sa.create_engine(postgres_url).begin() as connection:
        assert sa.inspect(connection).get_table_names() == []

        connection.execute(sa.text("CREATE TABLE step (step bigint)"))

    with sa.create_engine(postgres_url).begin() as connection:
        assert sa.inspect(connection).get_table_names() == ["step"]


def test_a_missing_program_fails_the_test_when_ci_requires_all(monkeypatch: pytest.MonkeyPatch, require_binary) -> None:
    monkeypatch.setenv("FP8SCOPE_REQUIRE_ALL", "1")
    with pytest.raises(pytest.fail.Exception, match=r"no-such-program is not installed.*make test-deps"):
        require_binary("no-such-program")

    monkeypatch.setenv("FP8SCOPE_REQUIRE_ALL", "0")
    with pytest.raises(pytest.skip.Exception, match="make test-deps"):
        require_binary("no-such-program")
