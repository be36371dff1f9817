"""Keeps the diagnosing process (`diagnosis.worker`) running beside the collector, and ends it with it."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import structlog

from fp8scope_collector.diagnosis.settings import Settings

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
ENDS_S = 3.0  # from the end of its input until it is killed

log = structlog.get_logger()


class Companion:
    """The process, started again where it ends by itself; all methods are called on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                code = await self._run()
                log.error("the diagnosing process has ended; it is started again", code=code, pause_s=pause_s)
            except OSError as error:
                log.error("the diagnosing process cannot be started", error=str(error), pause_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _run(self) -> int:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fp8scope_collector.diagnosis.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            # Ctrl-C in the terminal is the collector's. Not a session: Linux weighs each against the others as a whole,
            # and how nice a process of one is says nothing to those of another.
            process_group=0,
        )
        assert self._process.stdin
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(self._settings.to_line())
            await self._process.stdin.drain()
        return await self._process.wait()

    def end(self) -> None:
        """Tells the process to end, by the end of its input."""
        self._task.cancel()
        if self._process and self._process.stdin:
            self._process.stdin.close()

    async def close(self) -> None:
        """Ends the process, by force after `ENDS_S`."""
        self.end()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._process is None:
            return
        self.end()  # it may have started since
        try:
            await asyncio.wait_for(self._process.wait(), ENDS_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
