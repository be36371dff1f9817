"""The sender over real TLS: it delivers where the files are right, and says what is wrong where they are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from certificates import Authority
from fake_collector import FakeCollector
from fp8scope_agent.encode import finish_message
from fp8scope_agent.segments import FINISH, Record
from fp8scope_agent.sender import deliver
from fp8scope_agent.spool import SOURCE_FILE, SpoolWriter
from fp8scope_agent.status import DELIVERED, LEFT_OVER, read_status
from fp8scope_agent.stream import Timing
from fp8scope_agent.tls import Tls, tls_settings
from fp8scope_protos.v1 import telemetry_pb2 as pb
from fp8scope_protos.v1 import telemetry_pb2_grpc

QUICK = Timing(poll_s=0.01, heartbeat_s=0.1, opened_s=2.0, acked_s=2.0, drain_s=0.5)


@pytest.fixture(scope="module")
def authority(require_binary: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(require_binary("openssl"), tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def other(require_binary: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(require_binary("openssl"), tmp_path_factory.mktemp("others"), "other")


Listen = Callable[..., str]


@pytest.fixture
def listen(collector: FakeCollector) -> Iterator[Listen]:
    """A function: the address of a server with that certificate, which asks clients for one of `client_ca`."""
    servers = []

    def start(cert: Path, key: Path, client_ca: Path | None = None) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(4))
        telemetry_pb2_grpc.add_TelemetryServicer_to_server(collector, server)
        roots = client_ca.read_bytes() if client_ca else None
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), cert.read_bytes())], roots, require_client_auth=client_ca is not None
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait(5)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """A spool with one record: the end of a source."""
    folder = tmp_path / "source"
    folder.mkdir()
    opening = pb.Open(run="run", world_size=1, incarnation=1, source_uuid="uuid")
    (folder / SOURCE_FILE).write_bytes(opening.SerializeToString())
    writer = SpoolWriter(folder, max_bytes=1 << 30)
    payload = finish_message(seq=1, finished_unix_ns=1, failure=None, last_step=0, drops={})
    writer.append(Record(1, FINISH, 0, payload))
    writer.close()
    return folder


class Attempts:
    """A sender's lifetime that ends with its first trouble."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._until = time.monotonic() + 10

    def writer_ended(self) -> bool:
        return True

    def expired(self, acked_seq: int) -> bool:
        return bool(read_status(self._folder).problems) or time.monotonic() > self._until


def send(folder: Path, address: str, tls: Tls | None) -> tuple[int, dict[str, str]]:
    """A sender's result, and the troubles that it named."""
    result = deliver(folder, addresses=(address,), token=None, lifetime=Attempts(folder), tls=tls, timing=QUICK)
    return result, read_status(folder).problems


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_is_recorded_arrives_over_tls(
    authority: Authority, collector: FakeCollector, listen: Listen, spool: Path, host: str
) -> None:
    address = listen(*authority.issue("server")).replace("127.0.0.1", host)

    assert send(spool, address, Tls(authority.ca)) == (DELIVERED, {})
    assert collector.source.finish is not None


def test_a_client_certificate_opens_a_collector_that_asks_for_one(
    authority: Authority, listen: Listen, spool: Path
) -> None:
    address = listen(*authority.issue("server"), client_ca=authority.ca)

    assert send(spool, address, Tls(authority.ca, *authority.issue("agent"))) == (DELIVERED, {})


@pytest.mark.parametrize(
    ("server", "client", "cause", "words"),
    [
        ("tls", "plain", "tls_wanted", ["speaks TLS and this agent does not", "FP8SCOPE_TLS_CA"]),
        ("mtls", "plain", "tls_wanted", ["speaks TLS"]),
        ("plain", "tls", "tls_not_spoken", ["does not speak TLS", "--tls-cert", "unset the variable"]),
        ("expired", "tls", "certificate", ["is not trusted (certificate has expired)", "FP8SCOPE_TLS_CA"]),
        ("elsewhere", "tls", "certificate", ["is not trusted", "IP address mismatch", "127.0.0.1"]),
        ("tls", "other ca", "certificate", ["is not trusted", "unable to get local issuer certificate"]),
        ("mtls", "tls", "client_certificate", ["(it was shown none)", "FP8SCOPE_TLS_CLIENT_CERT"]),
        ("mtls", "other's", "client_certificate", ["does not accept this agent's certificate", "other-agent.pem)"]),
        ("mtls", "expired", "client_certificate", ["(it was shown /", "authority-agent.pem)", "TLS_CLIENT_KEY"]),
        ("tls", "gone", "tls_files", ["FP8SCOPE_TLS_CA", "cannot be read (No such file or directory)"]),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_way_out_and_the_data_waits(
    authority: Authority,
    other: Authority,
    collector: FakeCollector,
    listen: Listen,
    spool: Path,
    server: str,
    client: str,
    cause: str,
    words: list[str],
) -> None:
    if server == "plain":
        address = collector.address
    elif server == "expired":
        address = listen(*authority.issue("server", days=-1))
    elif server == "elsewhere":
        address = listen(*authority.issue("server", names="DNS:elsewhere.example"))
    else:
        address = listen(*authority.issue("server"), client_ca=authority.ca if server == "mtls" else None)
    settings = {
        "plain": lambda: None,
        "tls": lambda: Tls(authority.ca),
        "other ca": lambda: Tls(other.ca),
        "other's": lambda: Tls(authority.ca, *other.issue("agent")),
        "expired": lambda: Tls(authority.ca, *authority.issue("agent", days=-1)),
        "gone": lambda: Tls(spool / "gone.pem"),
    }

    result, problems = send(spool, address, settings[client]())

    assert result == LEFT_OVER
    assert list(problems) == [cause]
    assert [word for word in [*words, str(spool)] if word not in problems[cause]] == []
    assert collector.sources == {}
    right = Tls(authority.ca, *authority.issue("agent")) if server in ("tls", "mtls") else None
    assert server in ("expired", "elsewhere") or send_again(spool, address, right) == DELIVERED


def send_again(folder: Path, address: str, tls: Tls | None) -> int:
    """A sender that goes on until time is up, whatever an earlier one noted."""
    (folder / "sender.json").unlink()
    return send(folder, address, tls)[0]


def test_a_collector_that_is_away_is_no_matter_of_tls(
    authority: Authority, free_port: Callable[[], int], spool: Path
) -> None:
    _, problems = send(spool, f"127.0.0.1:{free_port()}", Tls(authority.ca))

    assert list(problems) == ["unavailable"]


def test_the_variables_are_checked_before_the_first_step(authority: Authority, other: Authority) -> None:
    cert, key = authority.issue("agent")
    files = {"CLIENT_CERT": str(cert), "CLIENT_KEY": str(key)}

    def settings(**variables: str) -> Tls | None:
        return tls_settings({f"FP8SCOPE_TLS_{name}": value for name, value in variables.items()})

    assert settings() is None
    assert settings(CA=str(authority.ca)) == Tls(authority.ca)
    assert settings(CA=str(authority.ca), **files) == Tls(authority.ca, cert, key)
    for variables, sentence in [
        (files, "is set without FP8SCOPE_TLS_CA"),
        ({"CA": str(authority.ca), "CLIENT_CERT": str(cert)}, "needs both FP8SCOPE_TLS_CLIENT_CERT and"),
        ({"CA": "/nowhere/ca.pem"}, r"FP8SCOPE_TLS_CA /nowhere/ca.pem cannot be read \(No such file"),
        ({"CA": str(key)}, r"FP8SCOPE_TLS_CA .* cannot be used \(.*\); expected PEM files"),
        ({"CA": str(other.ca), **files, "CLIENT_KEY": str(other.issue("b")[1])}, "KEY_VALUES_MISMATCH"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            settings(**variables)
