"""Breaks a training run in one of eleven ways, to see what fp8scope says of it; on the demo's GPT, for real.

    python examples/inject_fault.py --list
    python examples/inject_fault.py --fault weight-row --at 40 --steps 80 --collector 127.0.0.1:4327

takes all options of train_gpt.py. Each fault is a function that is called before every step with the job (model,
optimizer, schedule) and breaks what it is about to break; `FAULTS` says what each does, which rule should tell of it,
and of which tensor. The tests and the benchmark of the diagnosis inject the same ones.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

import train_gpt
from fp8core import AmaxScaling, ConstantScaling, DelayedScaling, Override
from fp8core.recipes import Recipe

LAYER = "blocks.1.mlp.fc1"
ALL_RECIPES = ("amax", "current", "delayed")
FITTING = ConstantScaling(input=4, weight=11, grad_output=18)  # fits the demo's model: 0 clipped, under 1 % lost


class Job(Protocol):
    """A training that a fault reaches into."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR


Fault = Callable[[Job, int], None]


class Killed(Exception):  # noqa: N818 - what happened
    """The process would be gone now."""


@dataclass(frozen=True)
class Spec:
    """A fault, what it does, and what should be said of it; `layer` and `role` "": any."""

    does: str
    fault: Callable[[int], Fault]
    rule: str
    layer: str = LAYER
    role: str = ""
    recipes: tuple[str, ...] = ALL_RECIPES
    at: int = 12  # the step from which it can be told from a healthy beginning
    ranks: int = 1
    swiglu: bool = False
    diverges: bool = False
    conversion: Mapping[str, Any] = field(default_factory=dict)


# Faults ------------------------------------------------------------------------------------------------------------


def higher_learning_rate(at: int, factor: float = 30.0) -> Fault:
    def fault(job: Job, step: int) -> None:
        if step == at:
            job.schedule.base_lrs = [rate * factor for rate in job.schedule.base_lrs]
            for group in job.optimizer.param_groups:
                group["lr"] *= factor

    return fault


def corrupted_weight_row(at: int, layer: str = LAYER, factor: float = 2.0**8) -> Fault:
    def fault(job: Job, step: int) -> None:
        if step == at:
            with torch.no_grad():
                weight_of(job, layer)[3] *= factor

    return fault


def nothing(at: int) -> Fault:
    """For faults that are there from the start, in how the model is converted."""
    return lambda job, step: None


def scaled_gradients(at: int, factor: float = 2.0**-20) -> Fault:
    """All gradients of the blocks are multiplied, as by a loss scale that is wrong."""

    def fault(job: Job, step: int) -> None:
        if step == at:
            job.model.get_submodule("norm").register_forward_pre_hook(_scale_gradient(factor))

    return fault


def nan_in_a_batch(at: int) -> Fault:
    """One embedded token is NaN in one step, as a bad sample makes it; the gradients make the weights NaN."""

    def fault(job: Job, step: int) -> None:
        if step == at:
            handle: Any = None

            def poison(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
                handle.remove()
                poisoned = embedded.clone()
                poisoned[0, 5] = torch.nan
                return poisoned

            handle = job.model.get_submodule("token").register_forward_hook(poison)

    return fault


def frozen_state(at: int, layer: str = "blocks.1.mlp.fc2", role: str = "weight") -> Fault:
    """The delayed scale of one tensor is put back before each step, as by a wrapper that loses the update."""
    kept: list[Tensor] = []

    def fault(job: Job, step: int) -> None:
        if step >= at:
            state = job.model.get_submodule(layer).get_buffer(f"fp8_state_{role}")
            if not kept:
                kept.append(state.clone())
            state.copy_(kept[0])

    return fault


def spike_in_one_step(at: int, layer: str = LAYER, factor: float = 2.0**10) -> Fault:
    """One element of a layer's input is very large in one step."""

    def fault(job: Job, step: int) -> None:
        if step == at:
            handle: Any = None

            def raise_one(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                handle.remove()
                raised = args[0].clone()
                raised.view(-1)[7] = factor * args[0].detach().abs().max()
                return (raised,)

            handle = job.model.get_submodule(layer).register_forward_pre_hook(raise_one)

    return fault


def changed_weight_of_a_rank(at: int, layer: str = LAYER) -> Fault:
    def fault(job: Job, step: int) -> None:
        if step == at:
            with torch.no_grad():
                weight_of(job, layer).mul_(1.01)

    return fault


def growing_outlier(at: int, layer: str = "blocks.1.mlp.down", bits: float = 0.5) -> Fault:
    """One channel of a SwiGLU: both of its rows point the same way and grow, so that their product grows twice as fast.

    arXiv 2409.12517 found this in FP8 training after 200 billion tokens. It is the channel that is largest as it is.
    """
    block = layer.rpartition(".")[0]
    channel = -1

    def find(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal channel
        largest = args[0].detach().abs().flatten(0, -2).amax(dim=0)
        channel = int(largest.argmax()) if channel < 0 else channel

    def fault(job: Job, step: int) -> None:
        if step == at - 1:
            job.model.get_submodule(layer).register_forward_pre_hook(find)
        if step >= at:
            gate, up = (weight_of(job, f"{block}.{name}") for name in ("gate", "up"))
            with torch.no_grad():
                if step == at:
                    up[channel] = gate[channel]
                gate[channel] *= 2.0**bits
                up[channel] *= 2.0**bits

    return fault


def dead_layer(at: int, layer: str = LAYER) -> Fault:
    """What comes after the layer multiplies its output by zero from step `at` on."""

    def fault(job: Job, step: int) -> None:
        if step == at:
            job.model.get_submodule(layer).register_forward_hook(lambda _, __, y: y * 0)

    return fault


def killed(at: int) -> Fault:
    def fault(job: Job, step: int) -> None:
        if step >= at:
            raise Killed

    return fault


def alternating_input(at: int, layer: str = LAYER, factor: float = 32.0) -> Fault:
    """A layer's input is larger at every second step, as with two kinds of batch in turn."""

    def fault(job: Job, step: int) -> None:
        if step == at:
            calls = iter(range(1 << 30))
            job.model.get_submodule(layer).register_forward_pre_hook(
                lambda _, args: (args[0] * (factor if next(calls) % 2 else 1.0),)
            )

    return fault


def weight_of(job: Job, layer: str) -> Tensor:
    weight: Tensor = job.model.get_submodule(layer).get_parameter("weight")
    return weight


def average_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Keeps the weights of ranks alike to the bit, as data-parallel training does.

    The same seed does not: with two threads the embedding's gradient differed in the first step on one machine.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def _scale_gradient(factor: float) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]  # torch does not annotate it

    return hook


FAULTS: Mapping[str, Spec] = {
    "learning-rate": Spec(
        "the learning rate times 30",
        *(higher_learning_rate, "amax-growth", "", "weight"),
        at=34,
        diverges=True,
    ),
    "weight-row": Spec(
        "one row of a weight times 2^8",
        *(corrupted_weight_row, "weight-scale-jump", LAYER, "weight"),
        diverges=True,
    ),
    "constant-too-high": Spec(
        "the constant scale of an input three exponents too high, from the start",
        *(nothing, "overflow", LAYER, "input"),
        recipes=("constant",),
        at=0,
        conversion={
            "recipe": FITTING,
            "overrides": [Override(LAYER, role="input", recipe=ConstantScaling(scale_exp2=10))],
        },
    ),
    "gradients-lost": Spec(
        "gradients times 2^-20",
        *(scaled_gradients, "underflow", "", "grad_output"),
        recipes=("constant", "delayed"),
        conversion={"recipe": FITTING},
    ),
    "nan-batch": Spec(
        "NaN in one batch",
        *(nan_in_a_batch, "nonfinite", "blocks.0.attn.qkv", "input"),
        diverges=True,
    ),
    "frozen-scale": Spec(
        "the delayed scale of a weight is never updated again",
        *(frozen_state, "scale-frozen", "blocks.1.mlp.fc2", "weight"),
        recipes=("delayed",),
    ),
    "spike": Spec(
        "one element of an input times 2^10 in one step",
        *(spike_in_one_step, "history-pinned", LAYER, "input"),
        recipes=("delayed",),
    ),
    "rank-weights": Spec(
        "a weight of one rank differs by 1 %",
        *(changed_weight_of_a_rank, "weights-diverged", LAYER, "weight"),
        ranks=2,
    ),
    "swiglu-growth": Spec(
        "one channel of a SwiGLU doubles with every step",
        *(growing_outlier, "amax-growth", "blocks.1.mlp.down", "input"),
        at=40,
        swiglu=True,
    ),
    "dead-layer": Spec(
        "the output of a layer is multiplied by zero",
        *(dead_layer, "dead-tensor", LAYER, "grad_output"),
    ),
    "rank-killed": Spec(
        "one of two ranks is gone",
        *(killed, "rank-missing", "", ""),
        at=20,
        ranks=2,
    ),
}


class SwiGlu(nn.Module):
    """The MLP that most large models have, in place of the demo's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 3 // 16) * 16
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x_BTC)) * self.up(x_BTC))
        return out


def recipe_of(spec: Spec, name: str) -> dict[str, Any]:
    """What `convert_to_fp8` gets for a fault under the recipe called `name`."""
    if name == "constant":
        return {"recipe": FITTING, **spec.conversion}
    recipes: dict[str, Callable[[], Recipe]] = {"delayed": DelayedScaling, "amax": AmaxScaling}
    return {"recipe": recipes.get(name, train_gpt.RECIPES[name])()}


# Command line ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the demo's GPT and break it.", add_help=False)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    parser.add_argument("--at", type=int, help="the step from which it is broken")
    parser.add_argument("--pace-s", type=float, default=0.0, help="seconds to wait before each step, to watch it")
    parser.add_argument("--list", action="store_true", help="what there is")
    args, rest = parser.parse_known_args(argv)
    if args.list or args.fault is None:
        for name, spec in FAULTS.items():
            tensor = " of ".join(part for part in (spec.role, spec.layer) if part) or "the run"
            print(f"{name:18} {spec.does} ({', '.join(spec.recipes)}): {spec.rule}, {tensor}")
        return 0 if args.list else 2
    spec = FAULTS[args.fault]
    training = train_gpt.parse(["--recipe", spec.recipes[0], *rest])
    if training.recipe not in spec.recipes:
        parser.error(f"--recipe is {training.recipe}; fault {args.fault} shows under {' or '.join(spec.recipes)}")
    if spec.swiglu:
        train_gpt.Mlp = SwiGlu  # type: ignore[assignment,misc]  # another MLP of the same interface
    at = spec.at if args.at is None else args.at
    fault = spec.fault(at)
    rank = int(os.environ.get("RANK", "0"))
    other = None
    if spec.ranks == 2 and "RANK" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            meeting_at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2", **meeting_at}
        command = [sys.executable, __file__, "--fault", args.fault, "--pace-s", str(args.pace_s)]
        command += [] if args.at is None else ["--at", str(args.at)]
        other = subprocess.Popen([*command, *rest, "--run", training.run], env=os.environ | {"RANK": "1"})

    averaging: Any = None

    def before_step(job: Job, step: int) -> None:
        nonlocal averaging
        time.sleep(args.pace_s)
        if step == 0 and spec.ranks > 1:
            averaging = job.optimizer.register_step_pre_hook(average_gradients)
        if step == at and spec.fault is killed:
            averaging.remove()  # who is left goes on alone
        if rank < spec.ranks - 1:
            return  # the last rank has it
        if step == at:
            print(f"step {step}: {spec.does}", flush=True)
        try:
            fault(job, step)
        except Killed:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if spec.ranks > 1:  # they share this machine, and would wait for each other's threads
            torch.set_num_threads(max(1, torch.get_num_threads() // spec.ranks))
            dist.init_process_group("gloo")
        train_gpt.train(training, before_step=before_step, conversion=recipe_of(spec, training.recipe))
    finally:
        if other:
            other.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
