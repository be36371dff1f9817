"""What travels to the browser about a chart: everything at first, then only what changed.

`changed` compares the figure's frame and every array with what was sent before; of an array it keeps the longest common
start, so that a tick of a live run sends its new columns. Knows nothing of Streamlit.
"""

from __future__ import annotations

import base64
import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8scope_dashboard.theme import Figure

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Sent:
    """The newest message about a chart: `version` is made from `base`, or from nothing."""

    version: int
    base: int | None
    arrays: dict[str, Array]
    frame: dict[str, Any]
    message: dict[str, Any]


_versions = itertools.count(time.time_ns() // 1000)  # a restarted server does not count anew


def changed(known: Sent | None, figure: Figure, *, height: int, view: Any = None, **parts: Any) -> Sent:
    """What to send now: what changed of the frame and of the arrays since `known`, or everything."""
    arrays: dict[str, Array] = {}
    skeleton = _without_arrays(figure, arrays, "", {})
    frame = {"height": height, "view": view, "figure": skeleton, **parts}
    if known is None or known.arrays.keys() != arrays.keys():
        return Sent(next(_versions), None, arrays, frame, {"frame": {"is": frame}, "arrays": _messages({}, arrays)})
    changes, columns = patch(known.frame, frame), _messages(known.arrays, arrays)
    if changes is None and not columns:
        return Sent(known.version, known.version, arrays, frame, {"frame": None, "arrays": {}})
    return Sent(next(_versions), known.version, arrays, frame, {"frame": changes, "arrays": columns})


def chart(sent: Sent) -> dict[str, Any]:
    """The message as panel.js reads it."""
    return {"kind": "chart", "version": sent.version, "base": sent.base, **sent.message}


def whole(figure: Figure, *, height: int) -> dict[str, Any]:
    """The message of a chart that is drawn once, on a page that Streamlit has no part in."""
    return chart(changed(None, figure, height=height))


def patch(old: Any, new: Any) -> dict[str, Any] | None:
    """What makes `new` of `old`: {"is": value}, or {"in": patches by key, "out": keys that go}; None: nothing."""
    if isinstance(old, dict) and isinstance(new, dict):
        inside = {key: patch(old[key], value) if key in old else {"is": value} for key, value in new.items()}
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inside = {str(i): patch(a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))}
    else:
        return None if type(old) is type(new) and old == new else {"is": new}
    inside = {key: change for key, change in inside.items() if change is not None}
    gone = [key for key in old if key not in new] if isinstance(old, dict) else []
    if not inside and not gone:
        return None
    return {"in": inside, "out": gone} if gone else {"in": inside}


def _messages(old: dict[str, Array], new: dict[str, Array]) -> dict[str, Any]:
    """Each changed array's columns after those that it shares with the old one."""
    messages = {}
    for name, array in new.items():
        before = old.get(name)
        if before is not None and (before.shape[:-1], before.dtype) != (array.shape[:-1], array.dtype):
            before = None
        keep = 0 if before is None else _common_columns(before, array)
        if before is not None and keep == array.shape[-1] == before.shape[-1]:
            continue
        part = np.ascontiguousarray(array[..., keep:])
        text = base64.b64encode(part.tobytes()).decode()
        messages[name] = {"dtype": array.dtype.str[1:], "shape": array.shape, "keep": keep, "base64": text}
    return messages


def _common_columns(old: Array, new: Array) -> int:
    """How many columns at the start are equal, bit for bit."""
    shared = min(old.shape[-1], new.shape[-1])
    word = f"u{new.dtype.itemsize}"
    differs = np.ascontiguousarray(old[..., :shared]).view(word) != np.ascontiguousarray(new[..., :shared]).view(word)
    columns = np.flatnonzero(differs.reshape(-1, shared).any(axis=0)) if shared else np.empty(0, int)
    return int(columns[0]) if columns.size else shared


def _without_arrays(value: Any, arrays: dict[str, Array], path: str, seen: dict[int, str]) -> Any:
    """`value` with every numpy array replaced by its name; the arrays go to `arrays`, in types that a browser has.

    An array that occurs twice travels once: `seen` has the name of each by its identity.
    """
    if isinstance(value, np.ndarray):
        if id(value) not in seen:
            seen[id(value)] = path
            whole = value.dtype.kind in "iu" and value.dtype != np.int16
            arrays[path] = value.astype(np.int32 if whole else value.dtype, copy=False)
        return {"$array": seen[id(value)]}
    if isinstance(value, dict):
        return {key: _without_arrays(item, arrays, f"{path}.{key}", seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item, arrays, f"{path}.{i}", seen) for i, item in enumerate(value)]
    return value
