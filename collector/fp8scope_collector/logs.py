"""How our processes log: one line an event, for people on a terminal, else JSON, in which no name can forge a line."""

from __future__ import annotations

import sys

import structlog


def log_to_stderr() -> None:
    """Sends structlog's events to standard error."""
    renderer: structlog.types.Processor = structlog.processors.JSONRenderer()
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
