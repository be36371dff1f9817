"""A real collector with TLS and tokens: who gets in, who is put out, and that no secret shows anywhere."""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from grpc_health.v1 import health_pb2, health_pb2_grpc

from certificates import Authority
from fp8scope_collector.config import ConfigError, serve_config
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.tokens import Scope, create, digest, find, read_all, revoke

Connect = Callable[..., Any]
Start = Callable[..., Any]
SOON_S = 5.0  # two seconds are promised; the machine may be busy


@pytest.fixture(scope="module")
def authority(require_binary: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(require_binary("openssl"), tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """The collector's database, before it starts."""
    engine = open_engine(f"sqlite:///{tmp_path}/test.db")
    migrate(engine)
    yield engine
    engine.dispose()


Make = Callable[..., str]


@pytest.fixture
def make(engine: sa.Engine) -> Make:
    """A function: the secret of a new token."""

    def call(name: str, scope: Scope = "ingest", *, seconds: float | None = None, **restricted: str) -> str:
        now = time.time_ns()
        restriction = {"project": None, "run": None, **restricted}
        until = None if seconds is None else now + int(seconds * 1e9)
        return create(engine, name=name, scope=scope, expires_unix_ns=until, now_unix_ns=now, **restriction)

    return call


def url(engine: sa.Engine) -> str:
    return f"sqlite:///{engine.url.database}"


def trust(ca: Path, cert: Path | None = None, key: Path | None = None) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), key.read_bytes() if key else None, cert.read_bytes() if cert else None
    )


def test_a_token_that_fits_lets_a_stream_in_and_no_secret_shows_anywhere(
    authority: Authority, engine: sa.Engine, make: Make, start_collector: Start, connect: Connect, wire: Any
) -> None:
    secrets = {"fits": make("fits", project="team"), "reads": make("reads", "read"), "other": make("other", run="x")}
    secrets |= {"all": make("all", "admin"), "revoked": make("revoked"), "expired": make("expired", seconds=0)}
    secrets |= {"unknown": "fp8s_somebody-else-s"}
    revoke(engine, find(engine, "revoked").id, now_unix_ns=1)
    cert, key = authority.issue("server")
    collector = start_collector(url(engine), "--auth", "tokens", "--tls-cert", cert, "--tls-key", key)
    credentials = trust(authority.ca)

    def answer(token: str | None) -> tuple[str, str]:
        stream = connect(collector.grpc, None, token=token, credentials=credentials)
        stream.send(open=wire.open("gpt", project="team"))
        stream.send(stats=wire.stats(1, wire.columns(1)))
        stream.finish_sending() if token in (secrets["fits"], secrets["all"]) else None
        code, sentence = stream.refusal()
        return code.name, sentence

    answers = {name: answer(secret) for name, secret in {"none": None, **secrets}.items()}
    health = health_pb2_grpc.HealthStub(grpc.secure_channel(collector.grpc, credentials))
    healthy = health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
    with urllib.request.urlopen(f"{collector.http}/metrics", timeout=10) as page:
        metrics = page.read().decode()
    collector.terminate()

    in_, unknown, denied = "OK", "UNAUTHENTICATED", "PERMISSION_DENIED"
    expected = {"none": unknown, "fits": in_, "reads": denied, "other": denied, "all": in_}
    assert {name: code for name, (code, _) in answers.items()} == {
        **expected,
        **dict.fromkeys(["revoked", "expired", "unknown"], unknown),
    }
    assert healthy == health_pb2.HealthCheckResponse.SERVING
    assert [token.name for token in read_all(engine) if token.last_used_unix_ns] == ["fits", "all"]
    assert collector.process.stdout
    shown = collector.log.read_text() + metrics + str(answers) + collector.process.stdout.read()
    assert "reads" in shown, "names are no secrets"
    for secret in secrets.values():
        assert secret.removeprefix("fp8s_")[:12] not in shown
        assert digest(secret) not in shown


def test_streams_end_soon_after_their_token_and_a_new_one_goes_on_where_they_stopped(
    engine: sa.Engine, make: Make, start_collector: Start, connect: Connect, wire: Any
) -> None:
    old, good = make("old"), make("good")
    collector = start_collector(url(engine), "--auth", "tokens")
    brief = make("brief", seconds=4)
    opening = wire.open("first")
    streams = {
        "old": connect(collector.grpc, opening, token=old),
        "brief": connect(collector.grpc, wire.open("second"), token=brief),
        "good": connect(collector.grpc, wire.open("third"), token=good),
    }
    for stream in streams.values():
        stream.send(stats=wire.stats(1, wire.columns(1)))
        stream.wait_ack(1)

    revoke(engine, find(engine, "old").id, now_unix_ns=time.time_ns())
    revoked_at = time.monotonic()
    refused = streams["old"].refusal()
    took_s = time.monotonic() - revoked_at
    expired = streams["brief"].refusal()

    assert took_s < SOON_S
    assert refused[0] is grpc.StatusCode.UNAUTHENTICATED
    assert refused[1].startswith("token 'old' was revoked on 20")
    assert expired[0] is grpc.StatusCode.UNAUTHENTICATED
    assert expired[1].startswith("token 'brief' expired on 20")
    streams["good"].send(stats=wire.stats(2, wire.columns(2)))
    streams["good"].wait_ack(2)
    assert connect(collector.grpc, opening, token=make("new")).opened.up_to_seq == 1


def test_a_client_certificate_is_asked_for_where_an_authority_is_given(
    authority: Authority, engine: sa.Engine, start_collector: Start, connect: Connect, wire: Any
) -> None:
    cert, key = authority.issue("server")
    files = ("--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca)
    collector = start_collector(url(engine), *files)

    without = connect(collector.grpc, None, credentials=trust(authority.ca))
    without.send(open=wire.open("run"))
    with_it = connect(collector.grpc, wire.open("run"), credentials=trust(authority.ca, *authority.issue("agent")))

    assert without.refusal()[0] is grpc.StatusCode.UNAVAILABLE
    assert with_it.opened.incarnation == 1


def test_a_new_certificate_is_used_without_a_restart_and_a_broken_one_is_not(
    require_binary: Callable[[str], Path],
    authority: Authority,
    tmp_path: Path,
    engine: sa.Engine,
    start_collector: Start,
    connect: Connect,
    wire: Any,
) -> None:
    newer = Authority(require_binary("openssl"), tmp_path, "newer")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(files: tuple[Path, Path]) -> None:
        for source, target in zip(files, (cert, key), strict=True):
            (tmp_path / "new").write_bytes(source.read_bytes())
            (tmp_path / "new").replace(target)

    def connects(ca: Path) -> bool:
        stream = connect(collector.grpc, None, credentials=trust(ca))
        stream.send(open=wire.open("run"))
        try:
            return bool(stream.receive().opened.incarnation)
        except grpc.RpcError:
            return False

    install(authority.issue("server"))
    collector = start_collector(url(engine), "--tls-cert", cert, "--tls-key", key)
    before = connect(collector.grpc, wire.open("before"), credentials=trust(authority.ca))
    reached = [connects(authority.ca), connects(newer.ca)]

    install(newer.issue("server"))
    reached += [connects(newer.ca), connects(authority.ca)]

    install((authority.issue("server")[0], newer.issue("server")[1]))
    reached += [connects(newer.ca), connects(newer.ca)]
    before.send(stats=wire.stats(1, wire.columns(1)))
    before.wait_ack(1)

    assert reached == [True, False, True, False, True, True]
    events = [(event["event"], event.get("reason", "")) for event in collector.events()]
    assert [name for name, _ in events if "certificate" in name] == [
        "certificate replaced",
        "the new certificate is unusable, the old one stays",
    ]
    assert next(reason for name, reason in events if "unusable" in name).startswith(f"the key in '{key}' belongs to")


def test_another_address_is_served_with_tls_and_tokens_and_so_are_its_metrics(
    authority: Authority, engine: sa.Engine, make: Make, start_collector: Start, connect: Connect, wire: Any
) -> None:
    sends, reads = make("sends"), make("reads", "read")
    cert, key = authority.issue("server")
    addresses = ("--grpc", "0.0.0.0:0", "--metrics", "0.0.0.0:0")
    collector = start_collector(url(engine), *addresses, "--tls-cert", cert, "--tls-key", key)
    address, http = (text.replace("0.0.0.0", "127.0.0.1") for text in (collector.grpc, collector.http))
    context = ssl.create_default_context(cafile=str(authority.ca))

    def get(path: str, token: str | None = None) -> tuple[int, str]:
        request = urllib.request.Request(f"{http}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert http.startswith("https://")
    assert get("/metrics")[0] == 401
    assert "no token came" in get("/metrics")[1]
    assert get("/metrics", sends)[0] == 403
    assert get("/metrics", reads)[0] == 200
    assert "fp8scope_build_info" in get("/metrics", reads)[1]
    assert get("/healthz") == (200, "ok\n")
    with pytest.raises(OSError, match=r".*"):
        urllib.request.urlopen(http.replace("https", "http") + "/healthz", timeout=10)
    refused = connect(address, None, credentials=trust(authority.ca))
    refused.send(open=wire.open("run"))
    assert refused.refusal()[0] is grpc.StatusCode.UNAUTHENTICATED
    assert connect(address, wire.open("run"), token=sends, credentials=trust(authority.ca)).opened.incarnation == 1


FILES = {"tls_cert": Path("cert"), "tls_key": Path("key")}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"grpc": "0.0.0.0:1"}, "--grpc 0.0.0.0:1 can be reached from other machines: encrypt it with --tls-cert and"),
        ({"grpc": "[::]:1"}, r"--grpc \[::\]:1 can be reached .* or put the collector into a private network and say"),
        ({"grpc": "0.0.0.0:1", "auth": "tokens"}, "--grpc 0.0.0.0:1 can be reached .*: encrypt it with --tls-cert"),
        ({"grpc": "0.0.0.0:1", "insecure_metrics": True}, "--grpc 0.0.0.0:1 can be reached"),
        ({"grpc": "0.0.0.0:1", "auth": "none", **FILES}, "and --auth none lets everybody in: leave it out"),
        ({"metrics": "0.0.0.0:1"}, "--metrics 0.0.0.0:1 can be reached .* and say --insecure-metrics"),
        ({"tls_cert": Path("cert")}, "TLS needs both --tls-cert and --tls-key"),
        ({"tls_client_ca": Path("ca")}, "TLS needs both --tls-cert and --tls-key"),
    ],
)
def test_what_would_be_open_to_everybody_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        serve_config(**{"db": "", "grpc": "127.0.0.1:0", "metrics": "127.0.0.1:0", **settings})


@pytest.mark.parametrize(
    ("settings", "tokens", "guard_metrics"),
    [
        ({}, False, False),
        ({"auth": "tokens"}, True, False),
        ({"grpc": "0.0.0.0:1", **FILES}, True, False),
        ({"grpc": "0.0.0.0:1", "metrics": "0.0.0.0:1", **FILES}, True, True),
        ({"grpc": "0.0.0.0:1", "metrics": "0.0.0.0:1", "insecure_metrics": True, **FILES}, True, False),
        ({"grpc": "0.0.0.0:1", "metrics": "0.0.0.0:1", "insecure": True}, False, False),
        ({"grpc": "0.0.0.0:1", "insecure": True, "auth": "tokens"}, True, False),
        ({"metrics": "0.0.0.0:1", **FILES}, False, True),
    ],
)
def test_tokens_are_asked_for_where_others_can_reach(
    settings: dict[str, Any], tokens: bool, guard_metrics: bool
) -> None:
    config = serve_config(**{"db": "", "grpc": "127.0.0.1:0", "metrics": "127.0.0.1:0", **settings})

    assert (config.tokens, config.guard_metrics) == (tokens, guard_metrics)


def test_files_that_cannot_be_used_are_a_sentence_at_the_start(
    require_binary: Callable[[str], Path], authority: Authority, tmp_path: Path, run: Callable[..., Any]
) -> None:
    cert, key = authority.issue("server")
    other = authority.issue("other")[1]
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    locked = tmp_path / "locked.pem"
    command = f"{require_binary('openssl')} pkey -in {key} -aes256 -passout pass:word -out {locked}"
    assert os.system(f"{command} 2>/dev/null") == 0

    def sentence(cert: Path, key: Path, *more: object) -> str:
        options = ("--tls-cert", str(cert), "--tls-key", str(key), *map(str, more))
        failed = run("serve", "--db", f"sqlite:///{tmp_path}/x.db", *options, fails=True)
        assert failed.stderr.count("\n") == 1
        said: str = failed.stderr
        return said

    assert "cannot read '/nowhere': No such file or directory" in sentence(Path("/nowhere"), key)
    assert f"there is no private key in '{cert}'; expected a PEM file" in sentence(cert, cert)
    assert f"there is no certificate in '{empty}'" in sentence(empty, key)
    assert f"the key in '{other}' belongs to another certificate than the one in '{cert}'" in sentence(cert, other)
    assert f"'{damaged}' and '{key}' cannot be used" in sentence(damaged, key)
    assert "the key without a password" in sentence(cert, locked)
    assert f"there is no certificate in '{empty}'" in sentence(cert, key, "--tls-client-ca", empty)
    assert f"'{damaged}' cannot be used" in sentence(cert, key, "--tls-client-ca", damaged)
    assert not (tmp_path / "x.db").exists()
    assert json.dumps(key.read_text()) not in sentence(cert, other)
