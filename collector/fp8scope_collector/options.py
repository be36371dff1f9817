"""What several commands share: their options, how long a time is, and how long work shows that it goes on."""

from __future__ import annotations

import re
import sys
import time
from typing import Annotated

import typer

from fp8scope_collector.config import ConfigError

Database = Annotated[
    str, typer.Option("--db", envvar="FP8SCOPE_DB", help="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE")
]
Run = Annotated[str, typer.Argument(help="A run's name, or project/name.")]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object on standard output instead of text.")]

_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_LONGEST_DAYS = 3650


def duration_s(option: str, text: str) -> int:
    """The seconds that `text` (90m, 12h, 30d) means.

    Raises:
        ConfigError: it is none, or longer than ten years.
    """
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_DAYS * _SECONDS["d"]:
        raise ConfigError(f"{option} is {text!r}; expected 90m, 12h or 30d, at most {_LONGEST_DAYS}d")
    return seconds


class Progress:
    """Says on standard error how far long work is: one line that changes on a terminal, else a line every 10 s."""

    def __init__(self, doing: str, unit: str) -> None:
        self._doing = doing
        self._unit = unit
        self._terminal = sys.stderr.isatty()
        self._next = time.monotonic() + (0.2 if self._terminal else 10.0)
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        """So much is done, of `total` (0: not known)."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (0.2 if self._terminal else 10.0)
        of = f" of {total:,} ({done / total:.0%})" if total else ""
        line = f"{self._doing}: {done:,}{of} {self._unit}"
        print(f"\r{line}\x1b[K" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()
        self._shown = self._terminal

    def end(self) -> None:
        """Nothing more comes."""
        if self._shown:
            print(file=sys.stderr)


def bytes_text(size: int) -> str:
    """The size for people, such as 1.4 GiB."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
