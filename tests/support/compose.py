"""docker-compose.yml and the Dockerfiles, read as far as we use them; what is not understood fails."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = ["fp8core", "protos", "agent", "collector", "dashboard"]


def interpolate(value: Any, environ: Mapping[str, str]) -> Any:
    """`value` with Compose's ${NAME:?message} replaced.

    Raises:
        ValueError: the variable is not set; the text is Compose's.
    """
    if isinstance(value, dict):
        return {key: interpolate(item, environ) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, environ) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, message = match.groups()
        if not environ.get(name):
            raise ValueError(f"required variable {name} is missing a value: {message}")
        return environ[name]

    assert "$" not in re.sub(r"\$\{\w+:\?[^}]+\}", "", value), f"only ${{NAME:?message}} is understood, not {value!r}"
    return re.sub(r"\$\{(\w+):\?([^}]+)\}", replace, value)


def load_compose(environ: Mapping[str, str]) -> dict[str, Any]:
    """docker-compose.yml with its anchors, merges and variables resolved."""
    loaded: dict[str, Any] = interpolate(yaml.safe_load((ROOT / "docker-compose.yml").read_text()), environ)
    return loaded


def seconds(duration: str) -> float:
    """Compose's `30s`."""
    assert duration.endswith("s"), f"only seconds are understood, not {duration!r}"
    return float(duration[:-1])


@dataclass(frozen=True)
class Dockerfile:
    """What a Dockerfile takes, installs and ends as."""

    path: Path
    base_images: list[str]
    copied: list[str]  # from the repository
    installed: list[str]  # arguments of pip install that are no options
    constraints: list[str]
    user: str
    workdir: str
    command: list[str]


def read_dockerfile(path: Path) -> Dockerfile:
    """The Dockerfile at `path`."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))
    images, copied, installed, constraints = [], [], [], []
    user, workdir, command = "root", "/", [""]
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        words = shlex.split(rest)
        match instruction:
            case "FROM":
                images.append(words[0])
                user = "root"
            case "COPY":
                if not words[0].startswith("--from="):
                    copied += words[:-1]
            case "RUN" if "pip install" in rest:
                words = words[words.index("install") + 1 :]
                constraints += [words.pop(words.index("--constraint") + 1) for _ in range(rest.count("--constraint"))]
                installed += [word for word in words if not word.startswith("--")]
            case "USER":
                user = words[0]
            case "WORKDIR":
                workdir = words[0]
            case "CMD":
                command = yaml.safe_load(rest)
            case "RUN" | "ENV" | "EXPOSE" | "ARG":
                pass
            case _:
                raise AssertionError(f"{path.name}: instruction {instruction} is not understood")
    return Dockerfile(path, images, copied, installed, constraints, user, workdir, command)


def docker_ignores(name: str) -> bool:
    """Whether .dockerignore keeps `name`, a file or folder of the repository's root, from the images."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert all(line.startswith(("!", "**/")) for line in lines[1:])
    return f"!{name}" not in lines
