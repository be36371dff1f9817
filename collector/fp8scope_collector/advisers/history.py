"""A run's tensors as the advisers look at them: amax and root mean square of each, step by step.

They come from the stored raw rows, merged over ranks; a step that a resumed life wrote again is that life's. Any run
will do whose rows have `amax`, `numel` and `sum_sq`: they describe the tensors, not the scales that these were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fp8core.formats import FORMATS, Fp8Format
from fp8core.records import Role
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.readmodels import Slot

Floats = npt.NDArray[np.float64]
_READ = ("incarnation", "step", "amax", "numel", "sum_sq")


@dataclass(frozen=True)
class TensorHistory:
    """One (layer, role): `amax` and `rms` at each of `steps`, ascending. Steps of zeros only have amax 0."""

    layer: str
    role: Role
    fmt: Fp8Format
    margin: int
    steps: npt.NDArray[np.int64]
    amax: Floats
    rms: Floats

    @property
    def name(self) -> str:
        """As findings name a tensor."""
        return f"{self.layer} {self.role}"


def histories(reader: Reader, run_id: int) -> list[TensorHistory]:
    """The tensors of a run in model order; those without a known format or a finite row are left out.

    Costs a pass over all raw rows, and 40 bytes of memory for each.
    """
    slots = [slot for slot in reader.slots(run_id) if slot.format in FORMATS]
    columns = _columns(reader.rows(run_id), slots)
    return [_history(slot, columns[index]) for index, slot in enumerate(slots) if index in columns]


def _columns(batches: Iterator[pa.RecordBatch], slots: list[Slot]) -> Mapping[int, Mapping[str, Floats]]:
    """The rows of each slot, by its place in `slots`: those whose amax and sums are known and finite."""
    place = {(slot.layer, slot.role.value): index for index, slot in enumerate(slots)}
    parts: dict[int, list[Floats]] = {}
    for batch in batches:
        keys = zip(batch.column("layer").to_pylist(), batch.column("role").to_pylist(), strict=True)
        where = np.array([place.get(key, -1) for key in keys])
        values = np.stack([batch.column(name).to_numpy(zero_copy_only=False).astype(float) for name in _READ])
        known = (where >= 0) & np.isfinite(values).all(axis=0) & (values[_READ.index("numel")] > 0)
        for index in np.unique(where[known]):
            parts.setdefault(int(index), []).append(values[:, known & (where == index)])
    return {index: dict(zip(_READ, np.concatenate(pieces, axis=1), strict=True)) for index, pieces in parts.items()}


def _history(slot: Slot, rows: Mapping[str, Floats]) -> TensorHistory:
    order = np.lexsort((rows["incarnation"], rows["step"]))
    step, incarnation = rows["step"][order], rows["incarnation"][order]
    steps, first = np.unique(step, return_index=True)
    newest = np.maximum.reduceat(incarnation, first)
    kept = incarnation == np.repeat(newest, np.diff([*first, step.size]))
    step, kept_rows = step[kept], {name: rows[name][order][kept] for name in ("amax", "numel", "sum_sq")}
    first = np.unique(step, return_index=True)[1]
    mean_sq = np.add.reduceat(kept_rows["sum_sq"], first) / np.add.reduceat(kept_rows["numel"], first)
    return TensorHistory(
        layer=slot.layer,
        role=slot.role,
        fmt=FORMATS[slot.format],
        margin=slot.margin,
        steps=steps.astype(np.int64),
        amax=np.maximum.reduceat(kept_rows["amax"], first),
        rms=np.sqrt(mean_sq),
    )
