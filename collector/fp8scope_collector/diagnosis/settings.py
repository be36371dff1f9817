"""What the collector tells the diagnosing process. Not on its command line: the URLs may hold passwords."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Webhook:
    """Where messages go, in which form, from which severity on; `dashboard` is the address that links begin with."""

    url: str = field(repr=False)
    form: Literal["json", "slack"] = "json"
    severity: Literal["info", "warning", "critical"] = "warning"
    dashboard: str = ""


@dataclass(frozen=True)
class Settings:
    """Which database is looked at how often, and who is told."""

    db: str
    every_s: float
    webhook: Webhook | None

    def to_line(self) -> bytes:
        """The settings as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> Settings:
        """The settings that `to_line` wrote."""
        read = json.loads(line)
        return Settings(read["db"], read["every_s"], Webhook(**read["webhook"]) if read["webhook"] else None)
