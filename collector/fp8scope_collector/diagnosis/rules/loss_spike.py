"""loss-spike: the loss jumps above its usual level; with the tensors that moved before it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import numpy as np

from fp8scope_collector.diagnosis import changes
from fp8scope_collector.diagnosis import thresholds as at
from fp8scope_collector.diagnosis.finding import Finding, Rule, findings
from fp8scope_collector.diagnosis.loss import losses
from fp8scope_collector.diagnosis.window import Window


def check(window: Window) -> Iterator[Finding]:
    """Steps whose loss is six spreads and 30 % above the median of the 32 before.

    The spread is the median deviation, so that one spike does not hide the next. With it come the three tensors whose
    amax moved most within the last 8 rows. Trust: small batches make the loss noisy, hence both conditions; at least 16
    steps make a reference.
    """
    bad = np.zeros((1, window.steps.size, 1), dtype=bool)
    excess, loss, usual = (np.zeros(bad.shape) for _ in range(3))
    for point in losses(window):
        known = point.before[-at.LOSS_ROWS :]
        known = known[np.isfinite(known)]
        if known.size < at.LOSS_ROWS // 2 or not np.isfinite(point.value):
            continue
        usually = median(known.tolist())
        above = point.value - usually
        if above <= max(at.LOSS_SHARE * abs(usually), excess[0, point.row, 0]):
            continue
        if above > at.LOSS_SPREADS * 1.4826 * median(np.abs(known - usually).tolist()):
            bad[0, point.row, 0] = True
            excess[0, point.row, 0], loss[0, point.row, 0], usual[0, point.row, 0] = above, point.value, usually
    numbers = {"loss": loss, "usual": usual}
    yield from findings(
        window, RULE.name, bad, excess, numbers=numbers, note=lambda row, _: _moved(window, row), of_run=True
    )


def _moved(window: Window, row: int) -> str:
    """The tensors that moved most in the eight rows up to `row`, in words."""
    amax = window.amax_exp2[:, max(0, row - 39) : row + 1]
    recent, usual = amax[:, -8:], amax[:, :-8]
    if usual.shape[1] < 8:
        return ""
    with np.errstate(invalid="ignore"):
        level = np.where(np.isnan(usual), 0, usual).sum(axis=1) / np.maximum((~np.isnan(usual)).sum(axis=1), 1)
        moves = recent - level[:, None]
    size = np.nan_to_num(np.abs(moves)).max(axis=(0, 1))
    texts = []
    for slot in np.argsort(-size, kind="stable")[:3]:
        if size[slot] < at.MOVED_BITS:
            break
        _, back = np.unravel_index(np.argmax(np.nan_to_num(np.abs(moves[:, :, slot]))), moves.shape[:2])
        step = window.steps[row - recent.shape[1] + 1 + int(back)]
        tensor = window.slots[slot]
        texts.append(f"{tensor.role} of {tensor.layer} by {size[slot]:.1f} bits at step {step}")
    return "moved before it: " + ", ".join(texts) if texts else "no tensor's amax moved by 2 bits before it"


RULE = Rule(
    name="loss-spike",
    says="the loss jumps above its usual level",
    cause="A bad batch, a learning rate too high, or numerics: then a tensor of the list moved first.",
    remedies={
        "": "Look at the tensors that moved before it. If none did, look at the batch; if gradients did, clip them; if "
        "weights did, lower the learning rate and resume from before the spike.",
    },
    changes={"": changes.CLIP_GRADIENTS},
    evidence="loss {loss:.3f}, usually {usual:.3f}",
    reach=39,
    check=check,
)
