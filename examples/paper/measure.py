"""What the study found, read from the collector's database: a run's numbers, its scales, and the advisers' advice.

Everything here goes through `Reader`, as a researcher's own notebook would. `results` is what `report.py` prints and
what is kept beside it as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from fp8core.records import Role
from fp8scope_collector.advisers import advise_constant, advise_refresh, histories
from fp8scope_collector.advisers.refresh import amax_exponents
from fp8scope_collector.storage.reader import Reader

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Numbers = dict[str, Any]

LAYERS = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
FIRST_STEPS = slice(10, 25)  # of observation (vi), against step 0; the warm-up ends at 20
LAST_STEPS = 60  # half of the shortest training: sizes are compared over as many steps
COUNTS = ("numel", "overflow", "underflow", "sum_sq", "err_sq")


def study(reader: Reader, runs: Sequence[Numbers], loss_scale: float) -> Numbers:
    """All numbers of the study. `runs` are the finished ones: name, kind, size, method, seed, task (None: text).

    Scores are read from the database; `cpu_seconds` and `parameters` are the only numbers that are not in it.
    """
    found: Numbers = {"loss_scale": loss_scale, "losses": {}, "accuracies": {}, "inference": {}, "sizes": {}}
    for run in runs:
        size, method = run["size"], run["method"]
        if run["kind"] == "infer":
            found["inference"].setdefault(size, {})[run["task"]] = inference(reader, run["name"])
            continue
        last = final(reader, run["name"])
        if run["task"] is None:
            found["losses"].setdefault(size, {}).setdefault(method, {})[run["seed"]] = last["validation_loss"]
        else:
            by_task = found["accuracies"].setdefault(size, {}).setdefault(run["task"], {})
            by_task.setdefault(method, {})[run["seed"]] = last["accuracy"]
    names = {run["name"] for run in runs}
    order = list(found["losses"])
    for part in ("accuracies", "inference"):  # as pre-training has the sizes
        found[part] = {size: found[part][size] for size in sorted(found[part], key=lambda size: _rank(order, size))}
    for size in order:
        found["sizes"][size] = of_size(reader, size, names)
    return found


def _rank(order: list[str], size: str) -> int:
    return order.index(size) if size in order else len(order)


def of_size(reader: Reader, size: str, names: set[str]) -> Numbers:
    """What one size's runs of seed 0 say of scales and casts, and both advisers of them."""
    amax, fp32 = f"{size}-train-amax-graphcore-seed0", f"{size}-train-fp32-seed0"
    moved = scales(reader, amax)
    found = {
        "advice": advice(reader, amax),
        "advice_from_shadow": advice(reader, fp32),
        "dynamics": dynamics(moved),
        "ends": ends(moved),
        "settled": depth({tensor: exponents[-LAST_STEPS:] for tensor, exponents in moved.items()}),
        "casts": {
            name.removeprefix(f"{size}-train-").removesuffix("-seed0"): casts(reader, name)
            for name in sorted(names)
            if name.startswith(f"{size}-train-") and name.endswith("-seed0")
        },
    }
    recorded = next((name for name in sorted(names) if name.startswith(f"{size}-infer-")), None)
    if recorded is not None:
        found["inference"] = depth(scales(reader, recorded))
        found["inference_advice"] = advice(reader, recorded)["constant"]
    return found


def inference(reader: Reader, name: str) -> Numbers:
    """The scores of a model's evaluation, and by constant."""
    scalars = {scalar.name: scalar for scalar in reader.scalars(reader.run(name).id, max_points=100_000)}
    constants = [int(each) for each in scalars.pop("constant").high]
    swept = dict(zip(constants, scalars.pop("score").high.tolist(), strict=True))
    return {**{each: float(scalar.high[0]) for each, scalar in scalars.items()}, "constants": swept}


def final(reader: Reader, name: str) -> dict[str, float]:
    """The last value of each of the run's scalars."""
    return {scalar.name: float(scalar.high[-1]) for scalar in reader.scalars(reader.run(name).id)}


def loss_curve(reader: Reader, name: str) -> Floats:
    """The training loss of each step."""
    (loss,) = reader.scalars(reader.run(name).id, ["loss"], max_points=100_000)
    return loss.high


def casts(reader: Reader, name: str) -> dict[str, Numbers]:
    """By role, over all steps and layers: the share that clipped, the share that vanished, and SQNR in decibels.

    `clipped_steps` is the share of tensors' steps at which anything clipped, as the refresh adviser counts.
    """
    sums: dict[tuple[int, str], Floats] = {}
    for batch in reader.rows(reader.run(name).id):
        roles, lives = (np.array(batch.column(of).to_pylist()) for of in ("role", "incarnation"))
        values = np.stack([batch.column(count).to_numpy(zero_copy_only=False).astype(float) for count in COUNTS])
        for life, role in set(zip(lives.tolist(), roles.tolist(), strict=True)):
            own = values[:, (roles == role) & (lives == life)]
            steps = [own.shape[1], np.count_nonzero(own[COUNTS.index("overflow")])]
            sums[life, role] = sums.get((life, role), 0) + np.array([*own.sum(axis=1), *steps])
    newest = max(life for life, _ in sums)  # one that was interrupted began anew
    return {
        role: _cast_numbers(dict(zip((*COUNTS, "steps", "clipped_steps"), totals, strict=True)))
        for (life, role), totals in sums.items()
        if life == newest
    }


def _cast_numbers(total: dict[str, float]) -> Numbers:
    return {
        "overflow": total["overflow"] / total["numel"],
        "underflow": total["underflow"] / total["numel"],
        "clipped_steps": total["clipped_steps"] / total["steps"],
        "sqnr_db": 10 * float(np.log10(total["sum_sq"] / total["err_sq"])) if total["err_sq"] > 0 else None,
    }


def passing(scores: dict[int, float], reference: float, *, lower_is_better: bool) -> list[int]:
    """The constants whose score is at least 99.5 % of the reference's, or whose loss is at most 0.5 % above it."""
    if lower_is_better:
        return sorted(constant for constant, loss in scores.items() if loss <= 1.005 * reference)
    return sorted(constant for constant, score in scores.items() if score >= 0.995 * reference)


def contiguous(inside: Sequence[int], swept: Iterable[int]) -> bool:
    """Whether no constant between two that pass was tried and failed."""
    return [each for each in sorted(swept) if inside and inside[0] <= each <= inside[-1]] == list(inside)


def advice(reader: Reader, name: str) -> Numbers:
    """What both advisers say from this one run."""
    tensors = histories(reader, reader.run(name).id)
    return {
        "constant": [asdict(each) for each in advise_constant(tensors)],
        "refresh": [asdict(each) for each in advise_refresh(tensors)],
    }


# Scales ------------------------------------------------------------------------------------------------------------


def scales(reader: Reader, name: str) -> dict[str, Ints]:
    """FP8-AMAX's scale_exp2 of each tensor, "layer role", at each step."""
    return {tensor.name: amax_exponents(tensor) for tensor in histories(reader, reader.run(name).id)}


def place(tensor: str) -> tuple[int, str, str]:
    """A tensor's block, kind of layer and role: "blocks.1.attn.qkv input" is (1, "attn.qkv", "input")."""
    layer, role = tensor.rsplit(" ", 1)
    parts = layer.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return int(parts[number]), ".".join(parts[number + 1 :]), role


def mode(values: Ints) -> int:
    """The most frequent value; of several the smallest."""
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def modes(of: dict[str, Ints]) -> dict[tuple[str, str], list[int]]:
    """By (role, kind of layer): the mode of each block, first to last."""
    found: dict[tuple[str, str], list[int]] = {}
    for tensor, exponents in of.items():
        _, kind, role = place(tensor)
        found.setdefault((role, kind), []).append(mode(exponents))
    return found


def dynamics(of: dict[str, Ints]) -> dict[str, Numbers]:
    """By role, over the steps of a training: how the scales moved, the mean over tensors unless it says otherwise."""
    found: dict[str, Numbers] = {}
    for role in Role:
        own = [exponents for tensor, exponents in of.items() if place(tensor)[2] == role]
        late = [each[-LAST_STEPS:] for each in own]
        rises = [mode(each[FIRST_STEPS]) - int(each[0]) for each in own]
        found[role.value] = {
            "flips_per_step": float(np.mean([np.mean(np.diff(each) != 0) for each in own])),
            "rise_in_first_steps": float(np.median(rises)),
            "largest_rise": int(np.max(rises)),
            "integers_in_last_steps": float(np.mean([np.unique(each).size for each in late])),
            "largest_jump": int(max(np.abs(np.diff(each)).max() for each in own)),
        }
    return found


def ends(of: dict[str, Ints]) -> dict[str, Numbers]:
    """By role: the first and the last block's scale less the median of the blocks between; means over kinds of layers.

    `last_dips` is how far the last block's scale falls below its own mode at worst. All of the last LAST_STEPS.
    """
    found: dict[str, Numbers] = {}
    for role in Role:
        by_kind: dict[str, list[Ints]] = {}
        for tensor, exponents in of.items():
            if place(tensor)[2] == role:
                by_kind.setdefault(place(tensor)[1], []).append(exponents[-LAST_STEPS:])
        first, last, dips, dips_between = [], [], [], []
        for blocks in by_kind.values():
            own = [mode(each) for each in blocks]
            between = float(np.median(own[1:-1] or own))
            first.append(own[0] - between)
            last.append(own[-1] - between)
            dips.append(own[-1] - int(blocks[-1].min()))
            dips_between += [mode(each) - int(each.min()) for each in blocks[1:-1]]
        found[role.value] = {
            "first": float(np.mean(first)),
            "last": float(np.mean(last)),
            "last_dips": float(np.mean(dips)),
            "middle_dips": float(np.mean(dips_between)) if dips_between else None,
        }
    return found


def depth(of: dict[str, Ints]) -> dict[str, Numbers]:
    """By role: the distinct values of all tensors' modes, the median, and how far they lie apart over depth by kind."""
    by = modes(of)
    found: dict[str, Numbers] = {}
    for role in {role for role, _ in by}:
        own = {kind: values for (each, kind), values in by.items() if each == role}
        everything = [value for values in own.values() for value in values]
        found[role] = {
            "median": float(np.median(everything)),
            "integers": len(set(everything)),
            "lowest": min(everything),
            "lowest_kind": min(own, key=lambda kind: min(own[kind])),
            "highest": max(everything),
            "highest_kind": max(own, key=lambda kind: max(own[kind])),
            "range_over_depth": {kind: max(values) - min(values) for kind, values in own.items()},
            "modes": own,
        }
    return found
