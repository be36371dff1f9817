"""Deep links: what every view shows is in its address, and nowhere else.

There is one page; its query parameters say which view it is: `view` names one, without it a layer means the tensor, a
run the run, and neither the list. `Where` is the parameters parsed; a value that makes no sense is as good as absent,
so that a mistyped address still opens the view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from fp8core.records import Role, parse_role
from fp8scope_collector.storage.reader import QUANTITIES, Quantity

DEFAULT_QUANTITY: Quantity = "scale_exp2"
VIEWS = ("scales", "compare", "findings", "system", "settings")
MOST_RUNS = 8


@dataclass(frozen=True)
class Where:
    """What a view shows. `first_step` and `last_step` None: from the start, and following the run.

    `runs` are those that are compared, the first one with the others; in the list, those that are ticked. `show` and
    `sort` mean what their view says.
    """

    run: str = ""
    layer: str = ""
    role: Role | None = None
    quantity: Quantity = DEFAULT_QUANTITY
    first_step: int | None = None
    last_step: int | None = None
    filter: str = ""
    step: int | None = None
    view: str = ""
    runs: tuple[str, ...] = ()
    show: str = ""
    sort: str = ""

    def params(self) -> dict[str, str]:
        """The query parameters, defaults left out."""
        steps = (self.first_step, self.last_step)
        found = {
            "view": self.view,
            "run": self.run,
            "runs": ",".join(quote(run, safe="/") for run in self.runs),
            "layer": self.layer,
            "role": self.role.value if self.role else "",
            "quantity": "" if self.quantity == DEFAULT_QUANTITY else self.quantity,
            "range": "" if steps == (None, None) else "-".join("" if s is None else str(s) for s in steps),
            "filter": self.filter,
            "step": "" if self.step is None else str(self.step),
            "show": self.show,
            "sort": self.sort,
        }
        return {name: value for name, value in found.items() if value}

    def to(self, **changes: Any) -> dict[str, str]:
        """The query parameters of this place with changes: a link, for the component."""
        return replace(self, **changes).params()

    def leave(self, **changes: Any) -> dict[str, str]:
        """The query parameters of another view of the same run: what only this one understands is dropped."""
        kept = Where(run=self.run, first_step=self.first_step, last_step=self.last_step, filter=self.filter)
        return replace(kept, **changes).params()


def parse(params: Mapping[str, str]) -> Where:
    """The place that query parameters name."""
    role = params.get("role", "")
    first_step, last_step = parse_range(params.get("range", ""))
    try:
        parsed_role = parse_role(role) if role else None
    except ValueError:
        parsed_role = None
    view = params.get("view", "")
    runs = [unquote(run) for run in params.get("runs", "").split(",") if run]
    return Where(
        run=params.get("run", ""),
        layer=params.get("layer", ""),
        role=parsed_role,
        quantity=quantity(params.get("quantity", "")),
        first_step=first_step,
        last_step=last_step,
        filter=params.get("filter", ""),
        step=_step(params.get("step", "")),
        view=view if view in VIEWS else "",
        runs=tuple(dict.fromkeys(runs))[:MOST_RUNS],
        show=params.get("show", ""),
        sort=params.get("sort", ""),
    )


def quantity(name: str) -> Quantity:
    """The quantity called `name`, or the default."""
    return next((known for known in QUANTITIES if known == name), DEFAULT_QUANTITY)


def parse_range(text: str) -> tuple[int | None, int | None]:
    """The steps of "300-420", "300-" (following) or "-420"; (None, None) where the text is none of them."""
    first, dash, last = text.partition("-")
    steps = _step(first), _step(last)
    if not dash or (first and steps[0] is None) or (last and steps[1] is None):
        return None, None
    if steps[0] is not None and steps[1] is not None and steps[0] > steps[1]:
        return steps[1], steps[0]
    return steps


def _step(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None
