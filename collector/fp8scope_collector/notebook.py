"""Stored runs as pandas DataFrames, for notebooks: `pip install fp8scope-collector[notebook]`.

    from fp8scope_collector.notebook import Database

    database = Database("sqlite:///fp8scope.db")
    database.runs()
    database.heatmap("gpt-fp8", "overflow").max(axis=1).nlargest(20)
    database.compare("gpt-fp8", "gpt-fp8-margin-3", "headroom")

A run is called by its name, or project/name; a tensor by layer and role. What is read, and at which resolution, is what
`storage.reader.Reader` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import pandas as pd

from fp8scope_collector.storage.history import FIRST_STEP, LAST_STEP
from fp8scope_collector.storage.reader import HeatMap, Quantity, Reader

Side = Literal["low", "high"]


class Database:
    """One database, read-only.

    Raises:
        StorageError: the database is missing, empty, unreachable or of another version.
    """

    def __init__(self, url: str) -> None:
        self.reader = Reader(url)

    def runs(self) -> pd.DataFrame:
        """All runs, the one heard from last first; the index is what they are called."""
        runs = self.reader.runs()
        return pd.DataFrame([asdict(run) for run in runs], index=pd.Index([run.ref for run in runs], name="run"))

    def slots(self, run: str) -> pd.DataFrame:
        """The tensors of a run, in model order, by layer and role."""
        slots = self.reader.slots(self.reader.run(run).id)
        frame = pd.DataFrame([asdict(slot) | {"role": str(slot.role)} for slot in slots])
        return frame.set_index(["layer", "role"])

    def heatmap(
        self,
        run: str,
        quantity: Quantity,
        *,
        side: Side = "high",
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_columns: int = 500,
    ) -> pd.DataFrame:
        """One quantity of all tensors: a row for each, a column for the first step of each column of the heat map."""
        run_id = self.reader.run(run).id
        found = self.reader.heatmap(
            run_id, quantity, first_step=first_step, last_step=last_step, max_columns=max_columns
        )
        return self._frame(run_id, found, side)

    def series(
        self,
        run: str,
        layer: str,
        role: str,
        fields: Sequence[str] = ("amax", "scale_exp2", "headroom"),
        *,
        first_step: int = FIRST_STEP,
        last_step: int = LAST_STEP,
        max_points: int = 750,
    ) -> pd.DataFrame:
        """Fields of one tensor over steps; columns are (field, low) and (field, high).

        Raises:
            KeyError: the run has no such tensor.
        """
        run_id = self.reader.run(run).id
        slot = int(self.slots(run).loc[(layer, role), "slot"])
        found = self.reader.series(
            run_id, slot, fields, first_step=first_step, last_step=last_step, max_points=max_points
        )
        columns = {(field, side): getattr(found, side)[field] for field in fields for side in ("low", "high")}
        return pd.DataFrame(columns, index=pd.Index(found.step, name="step"))

    def scalars(self, run: str, *, max_points: int = 750) -> pd.DataFrame:
        """Loss and the like over steps, one column for each; the mean of low and high where steps are merged."""
        found = self.reader.scalars(self.reader.run(run).id, max_points=max_points)
        columns = {s.name: pd.Series((s.low + s.high) / 2, index=pd.Index(s.step, name="step")) for s in found}
        return pd.DataFrame(columns)

    def rows(self, run: str) -> pd.DataFrame:
        """Every stored raw row of all ranks and incarnations: as much memory as the run has rows."""
        batches = [batch.to_pandas() for batch in self.reader.rows(self.reader.run(run).id)]
        return pd.concat(batches, ignore_index=True) if batches else pd.DataFrame()

    def compare(
        self, run: str, other: str, quantity: Quantity, *, side: Side = "high", max_columns: int = 500
    ) -> pd.DataFrame:
        """`other` minus `run`, of the tensors that both have, on the same columns of steps; NaN where one has none."""
        ids = [self.reader.run(ref).id for ref in (run, other)]
        width = max(self.reader.heatmap(run_id, quantity, max_columns=max_columns).width for run_id in ids)
        first, second = (
            self._frame(run_id, self.reader.heatmap(run_id, quantity, width=width), side) for run_id in ids
        )
        both = [key for key in first.index if key in second.index]
        steps = first.columns.union(second.columns)
        return second.loc[both].reindex(columns=steps) - first.loc[both].reindex(columns=steps)

    def _frame(self, run_id: int, found: HeatMap, side: Side) -> pd.DataFrame:
        slots = {slot.slot: (slot.layer, str(slot.role)) for slot in self.reader.slots(run_id)}
        names = pd.MultiIndex.from_tuples([slots[number] for number in found.slots.tolist()], names=["layer", "role"])
        return pd.DataFrame(getattr(found, side), index=names, columns=pd.Index(found.steps, name="step"))
