"""What a monitor is told: arguments of `attach`, FP8SCOPE_* variables and a settings file, checked once and frozen.

Everything that can be wrong about them is a ValueError here, before the first step; nothing later raises.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .addresses import DEFAULT_COLLECTOR, parse_addresses
from .sampling import PRESETS, Sampling, matches
from .sources import PREFIX, Sources
from .tls import tls_settings

DEFAULT_SPOOL_BYTES = 512 << 20
DEFAULT_LINGER_S = 30.0
DEFAULT_PRESET = "standard"
SETTINGS = (
    *("project", "collector", "tags", "notes"),
    *("preset", "every", "histogram_every", "burst", "include", "exclude"),
    *("spool_dir", "spool_bytes", "linger_s"),
    *("tls_ca", "tls_client_cert", "tls_client_key"),
)
_SMALLEST_SPOOL_BYTES = 16 << 20
_LONGEST_NAME = 200
_MOST_TAGS = 64
_LONGEST_NOTES = 1 << 16
_LONGEST_CONFIG = 1 << 20
_MASK = "***"
_SECRET_KEY = re.compile(
    r"(^|_)(token|tokens|password|passwd|secret|secrets|credential|credentials|api_?key|access_?key|private_?key)(_|$)"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)")


@dataclass(frozen=True)
class Settings:
    """A monitor's settings, complete and valid."""

    run: str
    project: str
    rank: int
    world_size: int
    addresses: tuple[str, ...]
    token: str | None = field(repr=False)
    spool_dir: Path
    spool_bytes: int
    linger_s: float
    sampling: Sampling
    include: tuple[str, ...]  # globs over layer names; empty: all
    exclude: tuple[str, ...]
    tls: Mapping[str, str]  # FP8SCOPE_TLS_* as the sender process gets them
    config_json: str
    tags: tuple[str, ...]
    notes: str

    def wants(self, layer: str) -> bool:
        """Whether the layer of this name is recorded."""
        return (not self.include or matches(layer, self.include)) and not matches(layer, self.exclude)


def resolve(
    *,
    run: str,
    project: str | None = None,
    collector: str | None = None,
    spool_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    config: object = None,
    tags: Sequence[str] | None = None,
    notes: str | None = None,
    preset: str | None = None,
    every: int | None = None,
    histogram_every: int | None = None,
    burst: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    settings: str | os.PathLike[str] | None = None,
    distributed: tuple[int, int] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings: an argument where it is given, else its variable, else the file's, else the default.

    `distributed` is (rank, world size) of an initialised process group; RANK and WORLD_SIZE come after it.

    Raises:
        ValueError: something is no possible value; the sentence says what is.
    """
    sources = Sources(environ, settings, SETTINGS, secrets=["token"])
    tls = {PREFIX + name.upper(): text for name in SETTINGS if name.startswith("tls_") and (text := sources.text(name))}
    tls_settings(tls)  # the sender reads these itself; here, so that a mistake shows before the first step
    final_rank, final_world_size = _rank(rank, world_size, distributed, environ)
    final_project = sources.text("project", project)
    final_tags = tuple(_name("tag", tag) for tag in sources.texts("tags", tags))
    final_notes = sources.text("notes", notes) or ""
    if len(final_tags) > _MOST_TAGS or len(final_notes) > _LONGEST_NOTES:
        raise ValueError(
            f"there are {len(final_tags)} tags and {len(final_notes)} characters of notes; expected at most "
            f"{_MOST_TAGS} and {_LONGEST_NOTES}"
        )
    return Settings(
        run=_name("run", run),
        project=_name("project", final_project) if final_project else "",
        rank=final_rank,
        world_size=final_world_size,
        addresses=parse_addresses(sources.text("collector", collector) or DEFAULT_COLLECTOR),
        token=_token(sources.text("token", token)),
        spool_dir=_spool_dir(sources.text("spool_dir", None if spool_dir is None else os.fspath(spool_dir))),
        spool_bytes=int(sources.number("spool_bytes", DEFAULT_SPOOL_BYTES, _SMALLEST_SPOOL_BYTES)),
        linger_s=sources.number("linger_s", DEFAULT_LINGER_S, 0),
        sampling=_sampling(sources, preset, every, histogram_every, burst),
        include=sources.texts("include", include),
        exclude=sources.texts("exclude", exclude),
        tls=tls,
        config_json=config_json(config),
        tags=final_tags,
        notes=final_notes,
    )


def _sampling(
    sources: Sources, preset: str | None, every: int | None, histogram_every: int | None, burst: int | None
) -> Sampling:
    """The preset, and what is set beside it."""
    name = sources.text("preset", preset) or DEFAULT_PRESET
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    base = PRESETS[name]
    return Sampling(
        every=sources.count("every", every, base.every, 1),
        histogram_every=sources.count("histogram_every", histogram_every, base.histogram_every, 0),
        burst=sources.count("burst", burst, base.burst, 0),
    )


def _rank(
    rank: int | None, world_size: int | None, distributed: tuple[int, int] | None, environ: Mapping[str, str]
) -> tuple[int, int]:
    if distributed is None:
        distributed = (
            int(_number("RANK", environ, 0, 0)),
            int(_number("WORLD_SIZE", environ, 1, 1)),
        )
    final_rank = _count("rank", distributed[0] if rank is None else rank, 0)
    if world_size is None and rank is not None:
        world_size = max(distributed[1], final_rank + 1)
    final_world_size = _count("world_size", distributed[1] if world_size is None else world_size, 1)
    if final_rank >= final_world_size:
        raise ValueError(f"rank is {final_rank} of world_size {final_world_size}; ranks run from 0 to world_size - 1")
    return final_rank, final_world_size


def _name(what: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{what} is {text!r}; expected a name, for example {what}='gpt-fp8'")
    if len(text) > _LONGEST_NAME or not text.isprintable():
        raise ValueError(f"{what} is {text!r}; expected at most {_LONGEST_NAME} printable characters")
    return text


def _token(token: str | None) -> str | None:
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ValueError("the token has characters that no token has (is a line break at its end?); expected ASCII")
    return token


def _spool_dir(path: str | os.PathLike[str] | None) -> Path:
    if path:
        return Path(path).expanduser().absolute()
    try:
        return Path.home() / ".cache" / "fp8scope" / "spool"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"fp8scope-spool-{os.getuid()}"


def _count(what: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} is {value!r}; expected a whole number, {least} or more")
    return value


def _number(variable: str, environ: Mapping[str, str], default: float, least: float) -> float:
    text = environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"the variable {variable} is {text!r}; expected a number, {least} or more")
    return value


def config_json(config: object, *, over: str = "") -> str:
    """`config` as a JSON object: a mapping, a dataclass or an argparse.Namespace, its secrets masked.

    Its keys replace those of `over`, an earlier result.

    Raises:
        ValueError: it is none of these, or too large.
    """
    if config is None:
        return over
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif not isinstance(config, Mapping) and hasattr(config, "__dict__"):
        config = vars(config)
    if not isinstance(config, Mapping):
        raise ValueError(f"config is {config!r}; expected a mapping, a dataclass or an argparse.Namespace")
    before: dict[str, object] = json.loads(over) if over else {}
    text = json.dumps(before | {str(key): _plain(value, str(key)) for key, value in config.items()}, ensure_ascii=False)
    if len(text) > _LONGEST_CONFIG:
        raise ValueError(
            f"config has {len(text)} characters as JSON; expected at most {_LONGEST_CONFIG}: is data in it?"
        )
    return text


def _plain(value: object, key: str = "") -> object:
    """`value` in JSON's types; what is none of them as text, and masked where `key` names a secret."""
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if _is_secret(key):
        return _MASK
    if isinstance(value, Mapping):
        return {str(name): _plain(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, key) for item in value]
    return _URL_PASSWORD.sub(_MASK, str(value))


def _is_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", key)
    return _SECRET_KEY.search(words.lower()) is not None
