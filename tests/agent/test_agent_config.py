"""Settings: an argument, else its variable, else the default; what cannot be is refused with the way out."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fp8scope_agent.addresses import parse_addresses
from fp8scope_agent.config import SETTINGS, Settings, resolve
from fp8scope_agent.sampling import Sampling


def settings(environ: Mapping[str, str] | None = None, **arguments: object) -> Settings:
    return resolve(**{"run": "run", "environ": environ or {}, **arguments})  # type: ignore[arg-type]


def test_defaults_need_nothing_but_a_run() -> None:
    given = settings()

    assert given.addresses == ("127.0.0.1:4327",)
    assert given.spool_dir == Path.home() / ".cache" / "fp8scope" / "spool"
    assert given.spool_bytes == 512 * 2**20
    assert (given.token, given.rank, given.world_size, given.linger_s) == (None, 0, 1, 30.0)
    assert given.sampling == Sampling(every=1, histogram_every=100, burst=16)
    assert (given.project, given.include, given.exclude, given.tags, given.notes) == ("", (), (), (), "")


def test_variables_are_used_and_arguments_win(tmp_path: Path) -> None:
    environ = {
        "FP8SCOPE_COLLECTOR": "a:1,b:2",
        "FP8SCOPE_TOKEN": "from-environment",
        "FP8SCOPE_SPOOL_DIR": "/elsewhere",
        "FP8SCOPE_SPOOL_BYTES": "20000000",
        "FP8SCOPE_LINGER_S": "2.5",
    }

    by_variable = settings(environ)
    by_argument = settings(environ, collector="c:3", token="given", spool_dir=tmp_path)

    assert by_variable.addresses == ("a:1", "b:2")
    assert (by_variable.token, by_variable.spool_dir) == ("from-environment", Path("/elsewhere"))
    assert (by_variable.spool_bytes, by_variable.linger_s) == (20_000_000, 2.5)
    assert (by_argument.addresses, by_argument.token, by_argument.spool_dir) == (("c:3",), "given", tmp_path)
    assert "given" not in repr(by_argument)


def test_an_argument_wins_over_its_variable_that_over_the_file_and_that_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "fp8scope.yaml"
    file.write_text(
        "preset: economy\nevery: 4\nburst: 3\nexclude: ['*.head']\ncollector: file:1\nlinger_s: 0.5\n"
        "spool_bytes: 17000000\nproject: p\ntags: [a, b]\n"
    )
    environ = {"FP8SCOPE_SETTINGS": str(file), "FP8SCOPE_EVERY": "5", "FP8SCOPE_EXCLUDE": "*.router, *.gate"}

    by_file = settings({}, settings=file)
    by_variable = settings(environ)
    by_argument = settings(environ, every=6, exclude=["x"], preset="full", project="q")

    assert by_file.sampling == Sampling(every=4, histogram_every=1000, burst=3)
    assert (by_file.exclude, by_file.addresses, by_file.linger_s) == (("*.head",), ("file:1",), 0.5)
    assert (by_file.spool_bytes, by_file.project, by_file.tags) == (17_000_000, "p", ("a", "b"))
    assert by_variable.sampling == Sampling(every=5, histogram_every=1000, burst=3)
    assert by_variable.exclude == ("*.router", "*.gate")
    assert by_argument.sampling == Sampling(every=6, histogram_every=10, burst=3)
    assert (by_argument.exclude, by_argument.project) == (("x",), "q")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("evry: 10", "'evry' in {file} is no setting; did you mean 'every'?"),
        ("spool-bytes: 1", "'spool-bytes' in {file} is no setting; did you mean 'spool_bytes'?"),
        ("colector: a:1", "did you mean 'collector'?"),
        ("zzz: 1", "choose from burst, collector, every"),
        ("token: abc", "a secret does not belong there; use FP8SCOPE_TOKEN"),
        ("every: often", "every in {file} is 'often'; expected a whole number, 1 or more"),
        ("every: 2.5", "every in {file} is 2.5; expected"),
        ("burst: true", "burst in {file} is True; expected"),
        ("linger_s: [1]", "linger_s in {file} is [1]; expected a number"),
        ("exclude: '*.head'", "exclude in {file} is the string '*.head'; expected a list of strings"),
        ("tags: [1]", "tags in {file} is [1]; expected a list of strings"),
        ("preset: fast", "preset 'fast' is unknown; choose one of economy, standard, full"),
        ("project: [a]", "project in {file} is ['a']; expected a text"),
        ("- every", "are a list; expected lines such as 'every: 10'"),
        ("every: [", "{file} are no YAML"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(content)

    with pytest.raises(ValueError, match=re.escape(sentence.format(file=file))) as caught:
        settings(settings=file)

    assert "abc" not in str(caught.value)


def test_an_absent_file_is_refused_and_an_empty_one_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")

    assert settings(settings=tmp_path / "empty.yaml") == settings()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        settings({"FP8SCOPE_SETTINGS": str(tmp_path / "absent.yaml")})


def test_without_pyyaml_a_file_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)

    with pytest.raises(ValueError, match=re.escape("pip install 'fp8scope-agent[yaml]'")):
        settings(settings=tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("EVRY", "EVERY"),
        ("COLECTOR", "COLLECTOR"),
        ("SPOOLDIR", "SPOOL_DIR"),
        ("TOKENS", "TOKEN"),
        ("SETTING", "SETTINGS"),
    ],
)
def test_a_variable_with_a_slip_is_refused(variable: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"FP8SCOPE_{variable} is no setting; did you mean FP8SCOPE_{meant}"):
        settings({f"FP8SCOPE_{variable}": "x"})


def test_variables_of_a_collector_beside_the_training_are_no_slips() -> None:
    root = Path(__file__).parents[2]
    code = "\n".join(path.read_text() for path in [*root.glob("collector/*/*.py"), *root.glob("fp8core/*/*.py")])
    others = set(re.findall(r"FP8SCOPE_[A-Z_]+[A-Z]", code))

    assert len(others) > 5
    for variable in sorted(others - {"FP8SCOPE_" + name.upper() for name in (*SETTINGS, "token")}):
        assert settings({variable: "x"}) == settings()


def test_the_rank_comes_from_the_argument_then_the_process_group_then_the_variables() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8"}

    assert (settings(torchrun).rank, settings(torchrun).world_size) == (3, 8)
    assert settings(torchrun, distributed=(5, 16)).rank == 5
    assert settings(torchrun, distributed=(5, 16)).world_size == 16
    assert settings(torchrun, distributed=(5, 16), rank=0, world_size=2).world_size == 2
    assert settings(rank=4).world_size == 5


@pytest.mark.parametrize(
    ("arguments", "environ", "sentence"),
    [
        ({"run": ""}, {}, "run is ''; expected a name"),
        ({"run": " "}, {}, "run is ' '; expected a name"),
        ({"run": 7}, {}, "run is 7; expected a name"),
        ({"run": "a\nb"}, {}, "printable"),
        ({"run": "x" * 201}, {}, "at most 200"),
        ({"project": "a\0"}, {}, "project is"),
        ({"rank": -1}, {}, "rank is -1; expected a whole number, 0 or more"),
        ({"rank": 1.0}, {}, "rank is 1.0"),
        ({"rank": 2, "world_size": 2}, {}, "rank is 2 of world_size 2; ranks run from 0"),
        ({"world_size": 0}, {}, "world_size is 0"),
        ({}, {"RANK": "three"}, "RANK is 'three'; expected a number"),
        ({"every": 0}, {}, "every is 0; expected a whole number, 1 or more"),
        ({"every": True}, {}, "every is True"),
        ({"collector": "localhost"}, {}, "'localhost' is no HOST:PORT"),
        ({"collector": "http://h:1"}, {}, "without http://"),
        ({"collector": "h:0"}, {}, "'h:0'"),
        ({}, {"FP8SCOPE_COLLECTOR": "h:99999"}, "'h:99999'"),
        ({"collector": ","}, {}, "collector is empty"),
        ({"token": "secret\n"}, {}, "line break"),
        ({}, {"FP8SCOPE_SPOOL_BYTES": "1GB"}, "FP8SCOPE_SPOOL_BYTES is '1GB'; expected a number, 16777216 or more"),
        ({}, {"FP8SCOPE_SPOOL_BYTES": "1000"}, "16777216 or more"),
        ({}, {"FP8SCOPE_LINGER_S": "inf"}, "FP8SCOPE_LINGER_S is 'inf'"),
        ({"config": 3}, {}, "config is 3; expected a mapping"),
        ({"config": {"data": "x" * 2_000_000}}, {}, "is data in it"),
        ({"tags": "a"}, {}, "tags is the string 'a'"),
        ({"tags": ["x"] * 65}, {}, "65 tags"),
        ({"notes": "n" * 70000}, {}, "70000 characters of notes"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        settings(environ, **arguments)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["127.0.0.1:4327", "host-1.cluster_x:1", "[::1]:65535", " a:1 , b:2 "])
def test_addresses_that_are_understood(text: str) -> None:
    assert parse_addresses(text) == tuple(part.strip() for part in text.split(","))


SECRETS = [
    "token",
    "hf_token",
    "API_KEY",
    "apiKey",
    "wandb-api-key",
    "Password",
    "client_secret",
    "aws.secret",
    "privateKey",
]
HARMLESS = ["tokenizer", "max_length", "lr", "keys", "author", "secretary", "passes", "monkey"]


@pytest.mark.parametrize("key", SECRETS)
def test_secrets_in_the_configuration_are_masked_at_any_depth(key: str) -> None:
    text = settings(config={"a": [{key: "hunter2"}], key: ["hunter2", {"b": "hunter2"}]}).config_json

    assert "hunter2" not in text
    assert json.loads(text) == {"a": [{key: "***"}], key: "***"}


@pytest.mark.parametrize("key", HARMLESS)
def test_what_only_looks_like_a_secret_is_kept(key: str) -> None:
    assert json.loads(settings(config={key: "value"}).config_json) == {key: "value"}


def test_numbers_of_tokens_are_no_secrets() -> None:
    config = {
        "max_tokens": 2048,
        "tokens": 3,
        "pad_token_id": 0,
        "use_token": True,
        "eos_token_id": None,
        "token_dropout": 0.1,
    }

    assert json.loads(settings(config=config).config_json) == config


def test_a_password_in_a_url_is_masked() -> None:
    text = settings(config={"db": "postgresql://user:hunter2@host/db"}).config_json

    assert json.loads(text) == {"db": "postgresql://***@host/db"}


@dataclass
class Config:
    lr: float
    path: Path


def test_a_configuration_may_be_a_mapping_a_dataclass_or_a_namespace() -> None:
    assert json.loads(settings(config=Config(0.1, Path("/x"))).config_json) == {"lr": 0.1, "path": "/x"}
    assert json.loads(settings(config=argparse.Namespace(lr=0.1)).config_json) == {"lr": 0.1}
    assert json.loads(settings(config={"nan": math.nan, 3: (1, None)}).config_json) == {"nan": "nan", "3": [1, None]}
    assert settings().config_json == ""
