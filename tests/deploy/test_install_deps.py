"""tests/install-deps.sh tells apart what it can install, what it can only name, and what is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/install-deps.sh"


def run_with(tools: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script where the only programs are `tools`: name to shell script."""
    for name, body in tools.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)
    command = [str(shutil.which("bash")), str(SCRIPT)]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=30, check=False)


def test_an_ordinary_user_is_told_the_command_and_nothing_is_installed(tmp_path: Path) -> None:
    log = tmp_path / "apt.log"

    done = run_with({"id": "echo 1000", "apt-get": f"echo $* >> {log}"}, tmp_path)

    assert done.returncode == 1
    assert re.search(r"sudo apt-get update && sudo apt-get install --no-install-recommends .*chromium", done.stderr)
    assert not log.exists()


def test_without_apt_the_missing_packages_are_named(tmp_path: Path) -> None:
    done = run_with({"id": "echo 0"}, tmp_path)

    assert done.returncode == 1
    assert "there is no apt-get here" in done.stderr
    assert "prometheus-alertmanager" in done.stderr


@pytest.mark.skipif(not os.access("/usr/sbin", os.W_OK), reason="the script writes /usr/sbin/policy-rc.d, as root")
def test_root_installs_what_is_missing_and_only_that_and_starts_no_service(tmp_path: Path) -> None:
    policy = Path("/usr/sbin/policy-rc.d")
    was_there = policy.exists()
    log = tmp_path / "apt.log"
    there = dict.fromkeys(
        ["chromium", "g++", "ss", "wget", "prometheus", "promtool", "initdb", "pg_dump", "pg_restore"], ""
    )
    apt = f"[ -x {policy} ] && echo $* >> {log}"
    real = {name: f'exec {shutil.which(name)} "$@"' for name in ["rm", "chmod"]}
    tools = {"id": "echo 0", "apt-get": apt, **real, **there}

    done = run_with(tools, tmp_path)

    assert done.returncode == 0, done.stderr
    update, install = log.read_text().splitlines()
    assert update.startswith("update")
    assert install.startswith("install")
    assert "--no-install-recommends" in install
    assert "prometheus-alertmanager" in install
    assert not {"chromium", "wget", "prometheus"} & set(install.split())
    assert policy.exists() == was_there


def test_every_program_that_a_test_requires_is_looked_for() -> None:
    script = SCRIPT.read_text()
    required = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"""require_binary\(["']([\w+-]+)["']\)""", path.read_text())
    }

    assert {"promtool", "initdb"} <= required
    assert {name for name in required if name not in script} == {"no-such-program"}
