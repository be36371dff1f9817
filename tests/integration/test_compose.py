"""docker-compose.yml does what it says, as far as that shows without a container engine.

The file's own commands are started with the file's own environment, mounts and health checks, on the loopback: host
names and ports are rewritten, nothing else. docs/adr/0052 says what that leaves out.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from compose import DISTRIBUTIONS, ROOT, Dockerfile, docker_ignores, load_compose, read_dockerfile
from compose_stack import Stack, eventually, running
from fp8core.records import Role
from fp8scope_collector.config import serve_config
from fp8scope_dashboard import links
from fp8scope_dashboard.__main__ import is_loopback, parse_address

PASSWORD = "p@ss/w:rd? #1"  # every character that a URL would stumble over
COMPOSE = load_compose({"POSTGRES_PASSWORD": PASSWORD})
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SMALL = ["--steps", "2", "--layers", "1", "--width", "32", "--heads", "2", "--batch", "1", "--validation-batches", "1"]
RULES = [
    rule
    for path in sorted(ROOT.glob("deploy/prometheus/rules/*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
METRICS_IN_RULES = {
    re.sub("_total$", "", name)  # a counter's family has the name without it
    for rule in RULES
    for name in re.findall(r"(?<![\w:])fp8scope_\w+(?![\w:])", rule["expr"])
}
DOCKERFILES = {path.name.split(".")[0]: read_dockerfile(path) for path in ROOT.glob("deploy/docker/*.Dockerfile")}


# The file ----------------------------------------------------------------------------------------------------------


def test_without_a_password_nothing_starts_and_the_message_says_where_to_put_one() -> None:
    with pytest.raises(ValueError, match=r"POSTGRES_PASSWORD is missing a value: write POSTGRES_PASSWORD=.*\.env") as e:
        load_compose({})

    named = re.findall(r"docs/[\w./-]+\w", str(e.value))
    assert named
    assert all((ROOT / page).exists() for page in named)


def test_the_file_holds_no_secret_and_git_ignores_the_one_beside_it() -> None:
    raw = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    secret = re.compile("PASSWORD|TOKEN|SECRET|KEY")
    values = [
        value
        for service in raw["services"].values()
        for name, value in service.get("environment", {}).items()
        if secret.search(name)
    ]

    assert values
    assert all(value.startswith("${POSTGRES_PASSWORD:?") for value in values)
    assert not re.search(r"://[^@/\s]*:[^@/\s]*@", (ROOT / "docker-compose.yml").read_text())
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert docker_ignores(".env")


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_every_port_is_published_on_the_loopback_alone(service: dict[str, Any]) -> None:
    assert all(re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port) for port in service.get("ports", []))
    assert "network_mode" not in service


def test_the_database_is_not_published_at_all() -> None:
    assert "ports" not in SERVICES["postgres"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_images_are_pinned_to_a_release(service: dict[str, Any]) -> None:
    name, _, tag = service["image"].partition(":")
    versions = {tomllib.loads((ROOT / d / "pyproject.toml").read_text())["project"]["version"] for d in DISTRIBUTIONS}

    assert re.match(r"v?\d+\.\d+", tag)
    if name.startswith("fp8scope-"):
        assert {tag} == versions


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_what_is_mounted_exists_and_files_of_the_repository_are_read_only(service: dict[str, Any]) -> None:
    for source, target, *mode in (volume.split(":") for volume in service.get("volumes", [])):
        assert target.startswith("/")
        if source.startswith("."):
            assert (ROOT / source).exists()
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


def test_every_declared_volume_is_used() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}

    assert COMPOSE["volumes"].keys() <= used


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_what_restarts_has_a_health_check_and_everything_a_bound_on_memory(service: dict[str, Any]) -> None:
    assert service["restart"] == ("no" if "profiles" in service else "unless-stopped")
    assert ("healthcheck" in service) == (service["restart"] != "no")
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_a_service_waits_for_the_health_of_what_it_needs(service: dict[str, Any]) -> None:
    for needed, how in service.get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "healthcheck" in SERVICES[needed]


def test_the_addresses_in_the_file_are_ones_that_the_programs_accept() -> None:
    collector, dashboard = SERVICES["collector"], SERVICES["dashboard"]
    addresses = collector["environment"]

    config = serve_config(
        db=addresses["FP8SCOPE_DB"],
        grpc=addresses["FP8SCOPE_GRPC"],
        metrics=addresses["FP8SCOPE_METRICS"],
        insecure="--insecure" in collector["command"],
    )

    assert (config.grpc.host, config.metrics.host) == ("0.0.0.0", "0.0.0.0")
    host, _ = parse_address(dashboard["environment"]["FP8SCOPE_LISTEN"])
    assert host == "0.0.0.0"
    assert is_loopback(host) or "--insecure" in dashboard["command"]


def test_our_services_have_no_rights_that_they_do_not_need() -> None:
    for name in DOCKERFILES:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


# The Dockerfiles ---------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def dependencies(installed: list[str]) -> tuple[set[str], set[str]]:
    """The distributions of ours that pip is given, and all names that they depend on, extras included."""
    ours, names = set(), set()
    for argument in installed:
        if not argument.startswith("./"):
            names.add(argument)
            continue
        folder, _, extra = argument.removeprefix("./").rstrip("]").partition("[")
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        ours.add(project["name"])
        required = project.get("dependencies", []) + project.get("optional-dependencies", {}).get(extra, [])
        names |= {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in required}
    return ours, names


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES.keys())
def test_a_dockerfile_copies_what_exists_and_what_the_context_holds(dockerfile: Dockerfile) -> None:
    assert dockerfile.copied
    for source in dockerfile.copied:
        assert (ROOT / source).exists()
        assert not docker_ignores(source)


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES.keys())
def test_a_dockerfile_builds_on_a_pinned_slim_image_and_runs_as_an_ordinary_user(dockerfile: Dockerfile) -> None:
    assert len(set(dockerfile.base_images)) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", dockerfile.base_images[0])
    assert dockerfile.user == "fp8scope"


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES.keys())
def test_a_dockerfile_installs_our_distributions_complete_and_at_locked_versions(dockerfile: Dockerfile) -> None:
    locked = {normal(line.split("==")[0]) for line in (ROOT / "requirements.lock").read_text().splitlines()}
    folders = [argument.removeprefix("./").split("[")[0] for argument in dockerfile.installed if argument[:2] == "./"]

    ours, names = dependencies(dockerfile.installed)

    assert set(folders) == set(dockerfile.copied) & set(DISTRIBUTIONS)
    assert dockerfile.constraints == ["requirements.lock"]
    assert {name for name in names if name.startswith(("fp8core", "fp8scope"))} <= ours
    assert {normal(name) for name in names - ours} <= locked


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        ("collector", {"torch", "streamlit", "plotly"}),
        ("dashboard", {"torch"}),
        ("training", {"streamlit", "sqlalchemy"}),
    ],
)
def test_an_image_holds_only_what_its_service_needs(image: str, absent: set[str]) -> None:
    assert dependencies(DOCKERFILES[image].installed)[1] & absent == set()


def test_the_training_image_has_what_its_command_and_the_example_import() -> None:
    dockerfile, command = DOCKERFILES["training"], SERVICES["training"]["command"]
    _, names = dependencies(dockerfile.installed)
    modules = {"fp8core", "fp8scope_agent", "fp8scope_protos", *names}

    script = Path(command[1])

    assert script.parts[0] in dockerfile.copied
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / script).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert imported - set(sys.stdlib_module_names) - modules == set()


def test_the_training_volume_belongs_to_the_user_who_writes_it() -> None:
    dockerfile = DOCKERFILES["training"]
    (volume,) = SERVICES["training"]["volumes"]
    home = f"/home/{dockerfile.user}"

    assert volume.split(":")[1] == f"{home}/.cache"
    assert f"install -d -o {dockerfile.user} -g {dockerfile.user} {home}/.cache" in dockerfile.path.read_text()


# The services, started ---------------------------------------------------------------------------------------------

FAULTY_STEPS, FAULT_AT, PACE_S = 38, 14, 0.4  # its episode is open for 17 steps, longer than /metrics takes to notice


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a webhook for Alertmanager, and the alerts that came."""
    got: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def told(address: str) -> Callable[[str], str]:
    """Alertmanager's file with its webhooks, which stand there as comments, at `address`; and with shorter waits."""

    def edit(text: str) -> str:
        text = re.sub(r"^( +)# ( *(?:webhook_configs:|- url:|send_resolved:))", r"\1\2", text, flags=re.MULTILINE)
        return re.sub(r"(group_wait|group_interval): \w+", r"\1: 1s", text.replace("127.0.0.1:9999", address))

    return edit


@pytest.mark.timeout(150)
def test_the_services_become_healthy_and_a_fault_in_training_becomes_an_alert_that_names_the_tensor_and_ends(
    tmp_path: Path,
    free_port: Callable[[], int],
    require_binary: Callable[[str], Path],
    postgres_server: Any,
    webhook: tuple[str, list[dict[str, Any]]],
) -> None:
    settings = SERVICES["postgres"]["environment"]
    address, alerts = webhook
    with postgres_server.connect() as connection:  # what the image does with its environment
        connection.execute(f"CREATE ROLE {settings['POSTGRES_USER']} LOGIN PASSWORD '{settings['POSTGRES_PASSWORD']}'")
        connection.execute(f"CREATE DATABASE {settings['POSTGRES_DB']} OWNER {settings['POSTGRES_USER']}")
    edits = {"alertmanager.yml": told(address)}

    with running(Stack(SERVICES, tmp_path, free_port, require_binary, postgres_server.port, edits)) as stack:
        stack.wait_until_healthy("postgres")
        stack.start("collector")
        stack.start("alertmanager")
        stack.start("prometheus")
        stack.wait_until_healthy("collector")
        stack.start("training", *SMALL)
        stack.start("dashboard")
        for name in ["alertmanager", "prometheus", "dashboard"]:
            stack.wait_until_healthy(name)

        # Prometheus discovers its targets and Alertmanager 5 seconds after its start.
        def is_wired() -> bool:
            return stack.prometheus("alertmanagers")["activeAlertmanagers"] and all(
                target["health"] == "up" for target in stack.prometheus("targets")["activeTargets"]
            )

        eventually(is_wired, 20, lambda: str(stack.prometheus("targets")) + stack.log("prometheus").read_text())
        training_code = stack.wait("training", 60)
        faulty = stack.start_beside("faulty", "examples/inject_fault.py", *faulty_arguments(stack, tmp_path))

        def findings(status: str) -> list[dict[str, Any]]:
            return [
                alert
                for alert in list(alerts)
                if alert["labels"]["alertname"] == "Fp8scopeFindingCritical" and alert["status"] == status
            ]

        def why() -> str:
            return f"{alerts}\n{stack.log('faulty').read_text()}\n{stack.log('collector').read_text()}"

        eventually(lambda: findings("firing"), 40, why)
        evaluated = {alert["labels"]["alertname"] for alert in stack.prometheus("alerts")["alerts"]}
        eventually(lambda: findings("resolved"), 40, why)
        faulty_code = faulty.wait(30)
        targets = stack.prometheus("targets")["activeTargets"]
        loaded = [rule for group in stack.prometheus("rules")["groups"] for rule in group["rules"]]
        exposed = set(re.findall(r"^# TYPE (\w+?)(?:_total)? ", stack.get(9464, "/metrics"), flags=re.MULTILINE))
        codes = stack.stop()
        said = {name: stack.log(name).read_text() for name in [*codes, "faulty"]}

    firing = findings("firing")[0]
    assert firing["labels"] == {
        "alertname": "Fp8scopeFindingCritical",
        "run": "faulty",
        "rule": "weight-scale-jump",
        "layer": "blocks.1.mlp.fc1",
        "role": "weight",
        "severity": "critical",
    }
    assert {alert["labels"]["layer"] for alert in findings("firing")} == {"blocks.1.mlp.fc1"}
    assert (ROOT / firing["annotations"]["runbook_url"]).exists()
    link = urlsplit(firing["annotations"]["dashboard_url"])
    assert f"{link.scheme}://{link.netloc}" == stack.rewrite("http://127.0.0.1:8501")
    where = links.Where(run="faulty", layer="blocks.1.mlp.fc1", role=Role.WEIGHT)
    assert links.parse(dict(parse_qsl(link.query))) == where
    assert {alert["labels"].get("run") for alert in alerts} <= {None, "faulty"}
    assert "Fp8scopeWatchdog" in evaluated
    assert [target["health"] for target in targets] == ["up"]
    assert sorted(rule["name"] for rule in loaded) == sorted(rule.get("alert") or rule["record"] for rule in RULES)
    assert [(rule["name"], rule["lastError"]) for rule in loaded if rule["health"] != "ok"] == []
    assert METRICS_IN_RULES - exposed == set()
    assert (training_code, faulty_code) == (0, 0), said["training"] + said["faulty"]
    assert codes["collector"] == 0, said["collector"]
    assert PASSWORD not in "".join(said.values())


def faulty_arguments(stack: Stack, folder: Path) -> list[str]:
    """A small run whose weight is broken in one step, slow enough to be watched."""
    size = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch", "2"]
    where = ["--collector", stack.rewrite("collector:4327"), "--run", "faulty", "--spool-dir", str(folder / "spool")]
    pace = ["--steps", str(FAULTY_STEPS), "--pace-s", str(PACE_S), "--validation-batches", "1"]
    return ["--fault", "weight-row", "--at", str(FAULT_AT), *size, *where, *pace]
