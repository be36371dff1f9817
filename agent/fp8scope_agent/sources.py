"""Where a setting comes from: an argument, else its FP8SCOPE_* variable, else a YAML file, else the default.

All three spell a setting alike. What they say is checked here, so that a sentence can name the place that it came from.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

PREFIX = "FP8SCOPE_"
FILE_VARIABLE = "FP8SCOPE_SETTINGS"
_ALIKE = 0.8  # a variable that is so close to one of ours is taken for a slip


class Sources:
    """The variables, and the file's keys, of settings called `names`; `secrets` are refused in a file.

    Raises:
        ValueError: the file cannot be read, or has a key that is no setting; a variable is nearly one of ours.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        file: str | os.PathLike[str] | None,
        names: Iterable[str],
        *,
        secrets: Iterable[str] = (),
    ) -> None:
        self._environ = environ
        self._file = Path(path).expanduser() if (path := file or environ.get(FILE_VARIABLE)) else None
        names, secrets = set(names), set(secrets)
        _refuse_slips(environ, names | secrets)
        self._in_file = _read(self._file, names, secrets) if self._file is not None else {}

    def find(self, name: str, argument: object = None) -> tuple[object, str]:
        """What is set, and how to call it in a sentence; None where nothing is."""
        if argument is not None:
            return argument, name
        variable = PREFIX + name.upper()
        if self._environ.get(variable):
            return self._environ[variable], f"the variable {variable}"
        if self._in_file.get(name) is not None:
            return self._in_file[name], f"{name} in {self._file}"
        return None, name

    def text(self, name: str, argument: object = None) -> str | None:
        """A text."""
        value, what = self.find(name, argument)
        if value is None or isinstance(value, str):
            return value
        raise ValueError(f"{what} is {value!r}; expected a text")

    def count(self, name: str, argument: object, default: int, least: int) -> int:
        """A whole number, `least` or more; a variable's text counts as one."""
        value, what = self.find(name, argument)
        if value is None:
            return default
        if isinstance(value, str) and argument is None and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} is {value!r}; expected a whole number, {least} or more")
        return value

    def number(self, name: str, default: float, least: float) -> float:
        """A finite number, `least` or more."""
        value, what = self.find(name)
        if value is None:
            return default
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # that is the question
        except (TypeError, ValueError):
            number = math.nan
        if not least <= number < math.inf:
            raise ValueError(f"{what} is {value!r}; expected a number, {least} or more")
        return number

    def texts(self, name: str, argument: object = None) -> tuple[str, ...]:
        """Several texts: a list, or in a variable separated by commas."""
        value, what = self.find(name, argument)
        if value is None:
            return ()
        if isinstance(value, str) and what.startswith("the variable"):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str):
            raise ValueError(f"{what} is the string {value!r}; expected a list of strings, for example [{value!r}]")
        if isinstance(value, list | tuple | set | frozenset) and all(isinstance(text, str) for text in value):
            return tuple(value)
        raise ValueError(f"{what} is {value!r}; expected a list of strings")


def _read(path: Path, names: set[str], secrets: set[str]) -> dict[str, object]:
    try:
        import yaml
    except ImportError:
        raise ValueError(
            f"PyYAML, which reads the settings in {path}, is not installed: pip install 'fp8scope-agent[yaml]'"
        ) from None
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"the settings in {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the settings in {path} are no YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"the settings in {path} are a {type(content).__name__}; expected lines such as 'every: 10'")
    for key in content:
        if key in secrets:
            raise ValueError(f"{key} is in {path}: a secret does not belong there; use {PREFIX}{str(key).upper()}")
        if key not in names:
            raise ValueError(f"{key!r} in {path} is no setting; {_nearest(str(key), names)}")
    return content


def _refuse_slips(environ: Mapping[str, str], names: set[str]) -> None:
    """A variable of ours with a typing error would be ignored silently. Others may belong to a collector here."""
    known = {PREFIX + name.upper() for name in names} | {FILE_VARIABLE}
    for variable in environ:
        if not variable.startswith(PREFIX) or variable.startswith(PREFIX + "TLS_") or variable in known:
            continue
        short = {name.removeprefix(PREFIX): name for name in known}
        near = difflib.get_close_matches(variable.removeprefix(PREFIX), short, n=1, cutoff=_ALIKE)
        if near:
            raise ValueError(f"the variable {variable} is no setting; did you mean {short[near[0]]}?")


def _nearest(key: str, names: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(names))}"
