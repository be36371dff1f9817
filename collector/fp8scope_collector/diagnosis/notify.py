"""Tells a webhook of findings, for people without Prometheus: a JSON object, or a text as Slack takes it.

A message is about one run: what began, what got worse, or what is over, the worst ten by name and the others counted.
It leaves in a thread of its own and is tried three times within half a minute; what does not fit into the queue or
cannot be delivered is counted and logged. Each finding is told once when it opens, once for each severity that it
rises to, and once when it is over. The address may hold a secret (Slack's does): it is never logged.
"""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlencode

import structlog

from fp8scope_collector.diagnosis.book import Change
from fp8scope_collector.diagnosis.catalogue import BY_NAME
from fp8scope_collector.diagnosis.finding import Severity
from fp8scope_collector.diagnosis.live import News
from fp8scope_collector.diagnosis.report import evidence
from fp8scope_collector.diagnosis.settings import Webhook

NAMED = 10  # findings of a message that are told by name
WAITING = 100  # messages that may wait
PAUSES_S = (1.0, 4.0)  # between the attempts
TIMEOUT_S = 5.0  # of one attempt
MESSAGE_VERSION = 1

Status = Literal["firing", "resolved"]
log = structlog.get_logger()


class Notifier:
    """Delivers messages until `close`. `tell` never waits."""

    def __init__(
        self,
        webhook: Webhook,
        *,
        post: Callable[[str, bytes], None] | None = None,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._webhook = webhook
        self._post = post or _post
        self._pauses_s = pauses_s
        self._closing = threading.Event()
        self._messages: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self.delivered = self.lost = 0
        self._thread = threading.Thread(target=self._run, name="fp8scope-notify", daemon=True)
        self._thread.start()

    def tell(self, news: Sequence[News]) -> None:
        """Queues what `news` has for the webhook; of runs that are over nothing is told."""
        for each in news:
            for body in messages(self._webhook, each):
                try:
                    self._messages.put_nowait(json.dumps(body).encode())
                except queue.Full:
                    self._lose("the queue is full")

    def close(self, timeout_s: float = 2.0) -> None:
        """Ends the thread; what is not delivered within the time is lost."""
        try:
            self._messages.put_nowait(None)
        except queue.Full:
            self._closing.set()
        self._thread.join(timeout_s)
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set() and (body := self._messages.get()) is not None:
            trouble = self._deliver(body)
            if trouble:
                self._lose(trouble)
            else:
                self.delivered += 1

    def _deliver(self, body: bytes) -> str:
        """Nothing, or why the message could not be delivered."""
        trouble = ""
        for pause_s in (0.0, *self._pauses_s):
            if self._closing.wait(pause_s):
                return "the collector ends"
            try:
                self._post(self._webhook.url, body)
            except urllib.error.HTTPError as error:
                trouble = f"it answered {error.code}"
                if error.code < 500 and error.code != 429:
                    return trouble
            except (OSError, ValueError) as error:  # unreachable, too slow, not HTTP
                trouble = type(getattr(error, "reason", error)).__name__
            else:
                return ""
        return trouble

    def _lose(self, reason: str) -> None:
        self.lost += 1
        log.error("a notification was not delivered", reason=reason, lost=self.lost)


def messages(webhook: Webhook, news: News) -> Iterator[dict[str, Any]]:
    """What the webhook gets of `news`: at most one message of what is going on and one of what is over."""
    least = Severity[webhook.severity.upper()]
    firing = [change for change in news.changes if change.kind != "closed" and change.finding.severity >= least]
    resolved = [change for change in news.changes if change.kind == "closed" and change.finding.severity >= least]
    if news.live and firing:
        yield _message(webhook, news.run, "firing", firing)
    if resolved and news.recent:
        yield _message(webhook, news.run, "resolved", resolved)


def _message(webhook: Webhook, run: str, status: Status, changes: Sequence[Change]) -> dict[str, Any]:
    changes = sorted(changes, key=lambda change: (-change.finding.severity, change.finding.first_step, change.id))
    named = [_finding(webhook, run, change) for change in changes[:NAMED]]
    more = len(changes) - len(named)
    if webhook.form == "slack":
        lines = [_line(status, run, finding) for finding in named]
        return {"text": "\n".join(lines + ([f"... and {more} more in {_escaped(run)}"] if more else []))}
    return {"version": MESSAGE_VERSION, "status": status, "run": run, "findings": named, "more": more}


def _finding(webhook: Webhook, run: str, change: Change) -> dict[str, Any]:
    finding, rule = change.finding, BY_NAME[change.finding.rule]
    slot = finding.slot
    return {
        "id": change.id,
        "event": change.kind,
        "severity": str(finding.severity),
        "rule": finding.rule,
        "layer": slot.layer if slot else None,
        "role": str(slot.role) if slot else None,
        "ranks": list(finding.ranks),
        "first_step": finding.first_step,
        "last_step": finding.last_step,
        "says": rule.says,
        "evidence": evidence(finding),
        "remedy": rule.remedy(slot),
        "change": rule.change(slot),
        "dashboard_url": dashboard_url(webhook.dashboard, run, slot.layer if slot else "", slot.role if slot else ""),
    }


def _line(status: Status, run: str, finding: dict[str, Any]) -> str:
    tensor = f"{finding['role']} of {finding['layer']}" if finding["layer"] else "the run"
    head = f"{finding['severity'].upper()}" if status == "firing" else "over"
    text = f"{head}: {run}: {tensor}: {finding['says']} since step {finding['first_step']} ({finding['evidence']})"
    link = f" <{finding['dashboard_url']}|dashboard>" if finding["dashboard_url"] else ""
    return _escaped(text) + link


def dashboard_url(dashboard: str, run: str, layer: str, role: str) -> str:
    """The dashboard's page of a run or a tensor; empty where nobody said where the dashboard is."""
    params = {"run": run, "layer": layer, "role": role}
    return f"{dashboard}/?{urlencode({k: v for k, v in params.items() if v})}" if dashboard else ""


def _escaped(text: str) -> str:
    """Text in which no name makes a link or calls a channel."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        answer.read(1024)
