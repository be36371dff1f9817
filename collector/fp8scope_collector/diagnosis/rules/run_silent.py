"""run-silent: nothing is heard of a run that has not ended."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """The last row of a run that has not ended, when none of its ranks has been heard of for five minutes.

    Agents send a sign of life every few seconds. This goes by the clock and not by rows: a replay knows of a silence
    that lasts, and of none that is over. Trust: exact; it cannot tell a dead job from a network that is down.
    """
    bad = np.zeros((1, window.steps.size, 1), dtype=bool)
    bad[0, -1:, 0] = window.silent_s >= at.SILENT_S
    silent = np.full(bad.shape, window.silent_s)
    yield from findings(window, RULE.name, bad, silent, numbers={"minutes": silent / 60}, of_run=True)


RULE = Rule(
    name="run-silent",
    says="nothing is heard of the run, and it has not ended",
    cause="The job was killed with its senders, its machine is down, or the network between is.",
    remedies={
        "": "Look at the job. If it runs, look at its sender: `fp8scope-agent status` on its machine says what waits "
        "there and why; nothing is lost as long as the spool has room.",
    },
    changes={"": "fp8scope-agent status"},
    evidence="nothing heard for {minutes:.0f} minutes",
    reach=0,
    check=check,
)
