"""Where a run runs: host, process, versions, device and git commit, as the text that travels with the run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata

import torch

# Named where the job has imported them: module and distribution.
_LIBRARIES = {
    "torchao": "torchao",
    "transformer_engine": "transformer-engine",
    "transformers": "transformers",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "peft": "peft",
    "deepspeed": "deepspeed",
    "triton": "triton",
}


def describe(devices: list[torch.device]) -> dict[str, str]:
    """The environment of this process; what cannot be found out is left out."""
    facts = {
        "host": socket.gethostname(),
        "pid": str(os.getpid()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "fp8core": _version("fp8core"),
        "device": ", ".join(dict.fromkeys(_device_name(device) for device in devices)),
        "git_commit": _git_commit(),
        **{name: _version(distribution) for name, distribution in _LIBRARIES.items() if name in sys.modules},
    }
    return {name: text for name, text in facts.items() if text}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _git_commit() -> str:
    """The commit of the working directory; empty outside a repository."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=2,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()
