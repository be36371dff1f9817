"""The operations page's way to reach a collector from other machines, command by command, to the rows stored."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fp8core
import fp8scope_agent as fp8scope
from programs import FP8SCOPE, Program, environment, wait_for_rows

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL)


def command_with(text: str) -> str:
    """The page's commands that contain `text`, for this machine's loopback."""
    (block,) = [block for block in COMMANDS if text in block]
    return block.replace("DNS:collector.example.org,IP:10.0.0.5", "DNS:localhost,IP:127.0.0.1")


def test_a_run_arrives_by_the_commands_of_the_operations_page_and_its_token_shows_nowhere(
    require_binary: Callable[[str], Path],
    start: Callable[..., Program],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.set_num_threads(1)
    database = f"sqlite:///{tmp_path}/fp8scope.db"
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), str(require_binary("openssl").parent), os.environ["PATH"]]
    )
    for commands in [
        command_with("collector.key -out collector.pem"),
        command_with("agents-ca.key -out agents-ca.pem"),
    ]:
        subprocess.run(
            ["bash", "-euc", commands],
            cwd=tmp_path,
            env=environment(PATH=path, FP8SCOPE_DB=database),
            check=True,
            capture_output=True,
            timeout=60,
        )
    secret = (tmp_path / "training.token").read_text().strip()
    assert secret.startswith("fp8s_")
    assert (tmp_path / "training.token").stat().st_mode & 0o077 == 0
    assert (tmp_path / "collector.key").stat().st_mode & 0o077 == 0

    options = [*("--tls-cert", tmp_path / "collector.pem"), *("--tls-key", tmp_path / "collector.key")]
    options += [*("--tls-client-ca", tmp_path / "agents-ca.pem"), *("--auth", "tokens")]
    addresses = ["--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    collector = start(FP8SCOPE, "serve", "--db", database, *addresses, *map(str, options), log="collector")
    port = collector.wait_for(r"grpc 127.0.0.1:(\d+),")[1]
    for name, value in {
        "COLLECTOR": f"localhost:{port}",
        "SPOOL_DIR": str(tmp_path / "spool"),
        "TOKEN": secret,
        "TLS_CA": str(tmp_path / "collector.pem"),
        "TLS_CLIENT_CERT": str(tmp_path / "node-7.pem"),
        "TLS_CLIENT_KEY": str(tmp_path / "node-7.key"),
    }.items():
        monkeypatch.setenv(f"FP8SCOPE_{name}", value)
    model = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(16, 16)))
    with fp8scope.attach(model, run="secured") as monitor:
        for _ in range(3):
            model(torch.randn(4, 16)).sum().backward()
            monitor.step()
            time.sleep(0.01)
    wait_for_rows(database, "secured", 9)

    assert caplog.messages == []
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "training.token"]
    assert len(files) > 5
    hidden = secret.removeprefix("fp8s_")[:16].encode()
    assert [path.name for path in files if hidden in path.read_bytes()] == []
