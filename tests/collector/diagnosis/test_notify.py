"""Webhooks hear of findings: once for each, in a form they take, and the collector never waits for them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from email.message import Message
from typing import Any

import pytest

from fp8core.records import Role
from fp8scope_collector.config import ConfigError, serve_config
from fp8scope_collector.diagnosis.book import Change, Kind
from fp8scope_collector.diagnosis.finding import Finding, Severity
from fp8scope_collector.diagnosis.live import News
from fp8scope_collector.diagnosis.notify import NAMED, WAITING, Notifier, messages
from fp8scope_collector.diagnosis.settings import Settings, Webhook
from fp8scope_collector.storage.readmodels import Slot

SLOT = Slot(1, "blocks.<1>.fc", Role.INPUT, "Fp8Linear", 8, 8, "E4M3FN", "DelayedScaling()", 0)
FINDING = Finding(
    *("underflow", Severity.WARNING, SLOT, (0, 3), 7, 9, 7, 9, 3, 0.4, 8, {"ratio": 0.4, "headroom": 12.0}),
)
HOOK = Webhook("http://hook/secret", dashboard="http://dash")


def change(kind: Kind = "opened", number: int = 1, **changes: Any) -> Change:
    return Change(kind, number, replace(FINDING, **changes))


def news(*changes: Change, live: bool = True, recent: bool = True) -> News:
    return News("lm/gpt", live, recent, changes)


def test_a_message_names_run_tensor_evidence_remedy_change_and_where_to_look() -> None:
    (message,) = messages(HOOK, news(change()))

    assert (message["version"], message["status"], message["run"], message["more"]) == (1, "firing", "lm/gpt", 0)
    assert message["findings"] == [
        {
            "id": 1,
            "event": "opened",
            "severity": "warning",
            "rule": "underflow",
            "layer": "blocks.<1>.fc",
            "role": "input",
            "ranks": [0, 3],
            "first_step": 7,
            "last_step": 9,
            "says": "non-zero elements are flushed to zero",
            "evidence": "40.0% of the non-zero elements lost at worst, headroom +12.0 bits",
            "remedy": message["findings"][0]["remedy"],
            "change": "convert_to_fp8(model, recipe=DelayedScaling(), "
            "overrides=[Override('blocks.<1>.fc', role='input', recipe=CurrentScaling())])",
            "dashboard_url": "http://dash/?run=lm%2Fgpt&layer=blocks.%3C1%3E.fc&role=input",
        }
    ]


def test_slack_gets_a_text_in_which_no_name_is_markup() -> None:
    (message,) = messages(replace(HOOK, form="slack"), news(change()))

    assert message == {
        "text": "WARNING: lm/gpt: input of blocks.&lt;1&gt;.fc: non-zero elements are flushed to zero since step 7 "
        "(40.0% of the non-zero elements lost at worst, headroom +12.0 bits) "
        "<http://dash/?run=lm%2Fgpt&layer=blocks.%3C1%3E.fc&role=input|dashboard>"
    }


def test_a_storm_is_one_message_with_the_worst_by_name() -> None:
    many = [change(number=i, severity=Severity.CRITICAL if i > 995 else Severity.WARNING) for i in range(1000)]

    (message,) = messages(HOOK, news(*many))

    assert [finding["id"] for finding in message["findings"]] == [996, 997, 998, 999, 0, 1, 2, 3, 4, 5]
    assert message["more"] == 1000 - NAMED


@pytest.mark.parametrize(
    ("told", "statuses"),
    [
        (news(change(), change("closed", 2)), ["firing", "resolved"]),
        (news(change("worse", severity=Severity.CRITICAL)), ["firing"]),
        (news(change("reopened")), ["firing"]),
        (news(change(severity=Severity.INFO)), []),
        (news(change(), live=False, recent=False), []),
        (news(change("closed"), live=False), ["resolved"]),
        (news(change("closed"), live=False, recent=False), []),
    ],
)
def test_what_is_told(told: News, statuses: list[str]) -> None:
    assert [message["status"] for message in messages(HOOK, told)] == statuses


def test_from_which_severity_on_is_a_setting() -> None:
    critical = replace(HOOK, severity="critical")

    assert list(messages(critical, news(change()))) == []
    assert len(list(messages(critical, news(change(severity=Severity.CRITICAL))))) == 1


class Hook:
    """A webhook that answers as it is told."""

    def __init__(self, *answers: Exception | None) -> None:
        self.got: list[dict[str, Any]] = []
        self._answers = list(answers)

    def __call__(self, url: str, body: bytes) -> None:
        assert url == "http://hook/secret"
        answer = self._answers.pop(0) if self._answers else None
        if answer:
            raise answer
        self.got.append(json.loads(body))


def refused(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://hook/secret", code, "", Message(), None)


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_fails_is_tried_again_and_then_lost_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    gone = ConnectionRefusedError()
    hook = Hook(gone, refused(503), None, refused(404), gone, gone, gone, None)
    notifier = Notifier(HOOK, post=hook, pauses_s=(0.0, 0.0))

    for number in range(4):
        notifier.tell([news(change(number=number))])
    eventually(lambda: notifier.delivered + notifier.lost == 4)
    notifier.close()

    assert [message["findings"][0]["id"] for message in hook.got] == [0, 3]
    assert (notifier.delivered, notifier.lost) == (2, 2)
    assert "secret" not in "".join(capsys.readouterr())


def test_a_webhook_that_hangs_holds_up_nobody() -> None:
    hanging = threading.Event()
    notifier = Notifier(HOOK, post=lambda _url, _body: bool(hanging.wait(10)) and None)

    for number in range(WAITING + 20):
        notifier.tell([news(change(number=number))])
    lost = notifier.lost
    hanging.set()
    notifier.close()

    assert 18 <= lost <= 20, "the queue is bounded, and what is too much is counted"


def test_settings_of_the_process_come_back_from_their_line_and_do_not_show_the_url() -> None:
    settings = Settings("sqlite:///a.db", 2.0, HOOK)

    assert Settings.from_line(settings.to_line()) == settings
    assert "secret" not in repr(settings)


def test_an_address_that_is_none_is_refused_without_repeating_it() -> None:
    places = {"db": "sqlite:///a.db", "grpc": "127.0.0.1:0", "metrics": "127.0.0.1:0"}

    for wrong in ("ftp://host/secret", "secret", "http:///secret"):
        with pytest.raises(ConfigError, match="--notify is no web address") as refusal:
            serve_config(**places, notify=wrong)
        assert "secret" not in str(refusal.value)
    config = serve_config(**places, notify="https://host/secret", dashboard_url="http://dash/")
    assert config.diagnosis is not None
    assert config.diagnosis.webhook == Webhook("https://host/secret", dashboard="http://dash")
    assert serve_config(**places, diagnosis=False).diagnosis is None
