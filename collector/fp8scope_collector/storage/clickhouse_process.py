"""A process that has a chDB folder for whoever reads it, while no collector has: run as a module, with the folder.

It answers as a collector does (`clickhouse_http`), ends when nothing was asked for some seconds, and leaves at once
when somebody is to change something in the folder (docs/adr/0084).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from fp8scope_collector.storage.clickhouse_http import ReadService, open_handle

UNUSED_S = 10.0  # that a process which is there to be read from waits for the next query
_STARTS_S = 60.0  # at most
_FAREWELL_S = 0.5  # in which those who have just read an offer still get their answer
_READY = "ready\n"


def read_from(folder: Path) -> str:
    """Starts a process that has the folder and lets others read it, until for some seconds nobody has.

    A process of its own, as chDB does not give back what it takes: each time that a process has opened a folder and
    closed it, five threads, eight descriptors and a megabyte stay behind, and 270 MiB in any case. A dashboard would
    have no descriptors left after a hundred times.

    Returns: why it did not start, or "" once it answers.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C in the terminal is not for what others may be reading from
    )
    assert process.stdout
    late = threading.Timer(_STARTS_S, process.kill)
    late.start()
    with process.stdout:
        said = process.stdout.readline()
    late.cancel()
    threading.Thread(target=process.wait, name="fp8scope-reading", daemon=True).start()
    return "" if said == _READY else said.strip() or f"the process that opens it ended, or took {_STARTS_S:.0f} s"


def main() -> None:
    """Has the folder that is named, for `read_from`."""
    folder = Path(sys.argv[1])
    try:
        with contextlib.closing(open_handle(os.path.realpath(folder))):
            service = ReadService(folder, gives_way=True)
            print(_READY, end="", flush=True)
            with Path(os.devnull).open("w") as nowhere:  # who reads all that the starter says would wait for this one
                os.dup2(nowhere.fileno(), sys.stderr.fileno())
            while not _is_left(service):
                pass
            service.close()
    except (RuntimeError, OSError) as error:
        print(" ".join(str(error).split()), flush=True)
        sys.exit(1)


def _is_left(service: ReadService) -> bool:
    """Whether, after a moment, nobody asks any more, or somebody else is to have the folder."""
    if service.left.wait(min(1.0, UNUSED_S)):
        return True
    if service.used_since(time.monotonic() - UNUSED_S):
        return False
    withdrawn_s = time.monotonic()
    service.withdraw()
    service.left.wait(_FAREWELL_S)
    if service.used_since(withdrawn_s) and not service.left.is_set():
        service.offer()
        return False
    return True


if __name__ == "__main__":
    main()
