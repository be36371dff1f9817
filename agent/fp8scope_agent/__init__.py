"""fp8scope's agent: `attach(model, run=...)` in a training job, and every FP8 scale of it is recorded.

Names are loaded on first use: the sender process lives in this package too, and must not pay for torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Monitor", "Shadow", "Snapshot", "__version__", "attach"]

if TYPE_CHECKING:
    from .adapters.shadow import Shadow
    from .monitor import Monitor
    from .session import attach
    from .snapshot import Snapshot


def __getattr__(name: str) -> object:
    if name == "attach":
        from .session import attach

        return attach
    if name == "Monitor":
        from .monitor import Monitor

        return Monitor
    if name == "Shadow":
        from .adapters.shadow import Shadow

        return Shadow
    if name == "Snapshot":
        from .snapshot import Snapshot

        return Snapshot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
