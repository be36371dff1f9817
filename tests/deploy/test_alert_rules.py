"""The rules that we ship: valid, tested, explained, and about metrics that the collector has."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from fp8scope_collector.limits import Limits
from fp8scope_dashboard import links

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yml"
RUNBOOKS = ROOT / "docs/runbooks"


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in sorted(PROMETHEUS.glob("rules/*.yml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDS = {rule["record"]: rule for rule in rules() if "record" in rule}


def alert_labels(alert: dict[str, Any]) -> set[str]:
    """The labels that its summary uses."""
    return set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_configuration_and_all_rule_files(require_binary: Callable[[str], Path]) -> None:
    said = run(require_binary("promtool"), "check", "config", PROMETHEUS / "prometheus.yml")

    assert f"{len(list(PROMETHEUS.glob('rules/*.yml')))} rule files found" in said


def test_the_rules_pass_their_promtool_tests(require_binary: Callable[[str], Path]) -> None:
    run(require_binary("promtool"), "test", "rules", *sorted(PROMETHEUS.glob("tests/*_test.yml")))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_tested_firing_and_silent(alert: str) -> None:
    files = [yaml.safe_load(path.read_text()) for path in PROMETHEUS.glob("tests/*_test.yml")]
    cases = [
        case
        for file in files
        for group in file["tests"]
        for case in group["alert_rule_test"]
        if case["alertname"] == alert
    ]

    assert any(case["exp_alerts"] for case in cases), "no case in which it fires"
    assert alert == "Fp8scopeWatchdog" or any(not case["exp_alerts"] for case in cases), "no case in which it is silent"


def with_examples(configuration: str) -> str:
    """The configuration with its commented webhooks made real."""
    return re.sub(r"^( +)# ( *(?:webhook_configs:|- url:|send_resolved:))", r"\1\2", configuration, flags=re.MULTILINE)


@pytest.mark.parametrize("variant", ["as it is", "with its webhooks"])
def test_alertmanager_accepts_the_configuration(
    variant: str, require_binary: Callable[[str], Path], tmp_path: Path
) -> None:
    text = ALERTMANAGER.read_text()
    configuration = tmp_path / "alertmanager.yml"
    configuration.write_text(text if variant == "as it is" else with_examples(text))

    run(require_binary("amtool"), "check-config", configuration)

    receivers = yaml.safe_load(configuration.read_text())["receivers"]
    assert all(("webhook_configs" in receiver) == (variant != "as it is") for receiver in receivers)


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=Fp8scopeOverflowSevere severity=critical run=gpt", "page"),
        ("alertname=Fp8scopeOverflow severity=warning run=gpt", "notify"),
        ("alertname=Fp8scopeWatchdog severity=none", "heartbeat"),
    ],
)
def test_alerts_are_routed_by_severity(labels: str, receiver: str, require_binary: Callable[[str], Path]) -> None:
    said = run(require_binary("amtool"), "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels.split())

    assert said.strip() == receiver


def test_inhibitions_name_alerts_and_labels_that_exist() -> None:
    for rule in yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]:
        named = re.findall(r"Fp8scope\w+", " ".join(rule["source_matchers"] + rule["target_matchers"]))

        assert named
        assert set(named) <= ALERTS.keys()


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS.keys())
def test_every_alert_says_how_bad_it_is_where_to_look_and_what_to_read(alert: dict[str, Any]) -> None:
    annotations = alert["annotations"]

    assert re.fullmatch(r"Fp8scope([A-Z][a-z]+)+", alert["alert"])
    assert alert["labels"]["severity"] in {"critical", "warning", "none"}
    assert set(annotations) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert annotations["runbook_url"] == f"{{{{ $externalLabels.fp8scope_runbooks }}}}/{alert['alert']}.md"
    assert "run" not in alert_labels(alert) or "/?run={{ $labels.run | urlquery }}" in annotations["dashboard_url"]


@pytest.mark.parametrize("alert", ALERTS.values(), ids=ALERTS.keys())
def test_an_alert_opens_a_page_of_the_dashboard_at_what_it_is_about(alert: dict[str, Any]) -> None:
    url = alert["annotations"]["dashboard_url"].replace("{{ $externalLabels.fp8scope_dashboard }}", "http://dashboard")
    of_layer = "{{ with $labels.layer }}&layer={{ . | urlquery }}&role={{ $labels.role }}{{ end }}"
    url = url.replace(of_layer, "&layer=blocks.1.fc&role={{ $labels.role }}")
    url = url.replace("{{ $labels.run | urlquery }}", "lm%2Fgpt").replace("{{ $labels.role }}", "weight")

    link = urlsplit(url)
    params = dict(parse_qsl(link.query))

    assert link.path in {"", "/"}
    assert links.parse(params).params() == params
    assert params.get("run", "lm/gpt") == "lm/gpt"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    pages = {path.stem for path in RUNBOOKS.glob("*.md")}

    assert pages == ALERTS.keys()


@pytest.mark.parametrize("alert", ALERTS)
def test_every_runbook_answers_the_same_four_questions(alert: str) -> None:
    page = (RUNBOOKS / f"{alert}.md").read_text()

    assert page.startswith(f"# {alert}\n")
    headings = re.findall(r"^## (.+)$", page, flags=re.MULTILINE)
    assert headings == ["What it means", "What usually causes it", "What to do", "How far to trust it"]


def test_the_alert_page_lists_every_alert_with_its_severity_and_no_other() -> None:
    page = (ROOT / "docs/alerts.md").read_text()
    listed = re.findall(r"^\| \[(Fp8scope\w+)\]\(runbooks/(\w+)\.md\) \| (\w+) \|", page, flags=re.MULTILINE)

    assert {name: severity for name, _, severity in listed} == {
        name: alert["labels"]["severity"] for name, alert in ALERTS.items()
    }
    assert all(name == target for name, target, _ in listed)
    assert set(re.findall(r"Fp8scope[A-Z]\w+", page)) == ALERTS.keys()


def test_recording_rules_are_used_by_an_alert() -> None:
    alerts = " ".join(alert["expr"] for alert in ALERTS.values())

    assert [name for name in RECORDS if name not in alerts] == []


def test_every_metric_in_a_rule_is_in_the_collectors_catalogue() -> None:
    catalogue = set(re.findall(r"\bfp8scope_\w+", (ROOT / "docs/metrics.md").read_text()))
    expressions = " ".join(rule["expr"] for rule in rules())
    for name in RECORDS:
        expressions = expressions.replace(name, "")

    used = set(re.findall(r"\bfp8scope_\w+", expressions))

    assert len(used) >= 10
    assert used - catalogue == set()


def test_the_queue_alert_fires_at_half_of_the_collectors_bound() -> None:
    expression = ALERTS["Fp8scopeQueueFilling"]["expr"]

    threshold_bytes = eval(expression.split(">")[1])

    assert threshold_bytes * 2 == Limits().queue_bytes
