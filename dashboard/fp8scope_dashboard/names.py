"""Which layers a filter names, and the tree of modules that they make.

A filter is a glob over the whole name, a part of the name where it has no wildcard, or a regular expression between
slashes. Regular expressions are RE2's (of pyarrow): their time is linear in the name, whatever the pattern is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from fp8scope_collector.storage.reader import Slot

LONGEST_FILTER = 200


def matching(slots: Sequence[Slot], pattern: str) -> list[Slot]:
    """The slots whose layer the filter names; all where it is empty.

    Raises:
        ValueError: the regular expression is malformed, or the filter too long.
    """
    if not pattern:
        return list(slots)
    if len(pattern) > LONGEST_FILTER:
        raise ValueError(f"the filter has {len(pattern)} characters; at most {LONGEST_FILTER} are read")
    if len(pattern) > 1 and pattern[0] == pattern[-1] == "/":
        names = pa.array([slot.layer for slot in slots], pa.string())
        try:
            found = pc.match_substring_regex(names, pattern[1:-1]).to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{pattern} is not a regular expression: {str(error).splitlines()[0]}") from error
        return [slot for slot, fits in zip(slots, found, strict=True) if fits]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [slot for slot in slots if fnmatch.fnmatchcase(slot.layer, glob)]


@dataclass
class Module:
    """A node of the tree: its name below its parent, how many layers it has, and the filter that names them."""

    name: str
    pattern: str
    layers: int = 0
    inside: dict[str, Module] = field(default_factory=dict)


def tree(layers: Sequence[str]) -> list[Module]:
    """The modules of the layers, in model order; a module with one child is one node with it."""
    root = Module("", "")
    for layer in layers:
        node, path = root, ""
        for part in layer.split("."):
            path = f"{path}.{part}" if path else part
            node = node.inside.setdefault(part, Module(part, _escape(path)))
            node.layers += 1
    for node in root.inside.values():
        _finish(node)
    return list(root.inside.values())


def _finish(node: Module) -> None:
    while len(node.inside) == 1:
        (only,) = node.inside.values()
        node.name, node.pattern, node.inside = f"{node.name}.{only.name}", only.pattern, only.inside
    if node.inside:
        node.pattern += ".*"
    for child in node.inside.values():
        _finish(child)


def _escape(name: str) -> str:
    """A name as a glob that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
