"""Opaque operations: how a function becomes `torch.ops.fp8core.NAME`, which a compiler calls and does not look into.

`Library.define` rather than `torch.library.custom_op`: 6 us a call against 15 to 21 (torch 2.13, one CPU thread).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Body = Callable[..., Tensor | tuple[Tensor, ...] | None]

_library = torch.library.Library("fp8core", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch's own signature


def define(schema: str, body: Body, on_meta: Body) -> Callable[..., Any]:
    """The operation of `schema`, now defined: `body` runs on every device but meta, where `on_meta` does.

    A compiler traces with fake tensors, which are on meta; `on_meta` has to return outputs of the right shapes.
    """
    _library.define(schema)  # type: ignore[no-untyped-call]  # torch's own signature
    name = schema.partition("(")[0]
    _library.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's own signature
    _library.impl(name, on_meta, "Meta")  # type: ignore[no-untyped-call]  # torch's own signature
    operation: Callable[..., Any] = getattr(torch.ops.fp8core, name).default
    return operation
