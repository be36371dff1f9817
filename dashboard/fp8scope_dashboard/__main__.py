"""`python -m fp8scope_dashboard --db URL --listen HOST:PORT`: serves the dashboard until SIGTERM or SIGINT.

An address that other machines reach wants a login (`--login FILE`, see login.py), unless `--insecure` says that it is
meant to be open.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from fp8scope_dashboard.login import VARIABLE, read

DEFAULT_DB = "sqlite:///fp8scope.db"
DEFAULT_LISTEN = "127.0.0.1:8501"


def main() -> NoReturn:
    """Reads the arguments, binds the address, serves; ends with the exit status."""
    parser = argparse.ArgumentParser(prog="fp8scope dashboard", description="Shows FP8 training runs in the browser.")
    parser.add_argument("--db", default=os.environ.get("FP8SCOPE_DB", DEFAULT_DB), metavar="URL")
    parser.add_argument("--listen", default=os.environ.get("FP8SCOPE_LISTEN", DEFAULT_LISTEN), metavar="HOST:PORT")
    parser.add_argument(
        "--insecure", action="store_true", help="listen where other machines can connect, without login"
    )
    parser.add_argument(
        "--login",
        default=os.environ.get(VARIABLE),
        metavar="FILE",
        help="who may look: a TOML file with [auth] and allow",
    )
    arguments = parser.parse_args()
    try:
        host, port = parse_address(arguments.listen)
        if not arguments.insecure and not arguments.login and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines and nobody has to log in; "
                "say who may look with --login FILE, listen on 127.0.0.1, or say --insecure"
            )
        if arguments.login:
            read(Path(arguments.login))
            os.environ[VARIABLE] = arguments.login
        listener = bind(host, port)
    except ValueError as error:
        sys.exit(f"fp8scope dashboard: {error}")
    os.environ["FP8SCOPE_DB"], os.environ["FP8SCOPE_LISTEN"] = arguments.db, arguments.listen
    asyncio.run(serve(listener, host))
    sys.stdout.flush()
    os._exit(0)  # a script thread may still wait for the database; nothing is left to be saved


async def serve(listener: socket.socket, host: str) -> None:
    """Serves until SIGTERM or SIGINT, then ends within a second."""
    os.environ.setdefault("STREAMLIT_BROWSER_GATHER_USAGE_STATS", "false")
    import uvicorn

    from fp8scope_dashboard.asgi import create_app

    class Server(uvicorn.Server):
        async def startup(self, *arguments: Any, **options: Any) -> None:
            await super().startup(*arguments, **options)
            logging.getLogger("uvicorn.access").disabled = True  # streamlit's logging would print every request
            logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
            shown = f"[{host}]" if ":" in host else host
            print(f"fp8scope dashboard: http://{shown}:{listener.getsockname()[1]}", flush=True)

    config = uvicorn.Config(
        create_app(), log_level="error", access_log=False, timeout_graceful_shutdown=1, ws="websockets-sansio"
    )
    server = Server(config)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.should_exit = True

    serving = asyncio.ensure_future(server._serve(sockets=[listener]))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await serving


def parse_address(listen: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT".

    Raises:
        ValueError: the text is something else.
    """
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {listen!r} is malformed; expected HOST:PORT, for example {DEFAULT_LISTEN}")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: the port is taken, or the host is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --listen") from error
    return listener


if __name__ == "__main__":
    main()
