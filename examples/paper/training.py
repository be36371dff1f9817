"""One training of the study: a GPT, pre-trained or fine-tuned, by one method, under the agent.

The method decides how the linear layers of the blocks compute; all else is float32 and the same: initialisation, order
of the data, schedule, a constant loss scale. The loss scale is the paper's, too: a constant FP8 scale for all tensors
can serve gradients and activations only if gradients are as large (FP8-AMAX does not see it: its own scale makes up
for it).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8core
import fp8scope_agent as fp8scope
from fp8core.recipes import Recipe
from paper import tasks
from train_gpt import Gpt, batches, learning_rate, standard_library_bytes

PROJECT = "paper"
HELD_OUT = 1_500  # examples of a task, at most
STEPS_AHEAD = 8  # of what is written: half of what the agent has room for
LossOf = Callable[[Tensor, Tensor], Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A model's shape and how long and fast it learns; `lr` is the peak of pre-training, fine-tuning takes a third."""

    name: str
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    steps: int
    lr: float
    tuning_steps: int

    @property
    def parameters(self) -> int:
        """Of the blocks' linear layers."""
        return 12 * self.layers * self.width**2


@dataclass(frozen=True)
class Job:
    """A run of the study. `task` is None for pre-training; fine-tuning starts from `fp32`'s pre-trained weights."""

    size: Size
    method: str
    seed: int
    loss_scale: float
    validation_batches: int
    task: str | None = None

    @property
    def name(self) -> str:
        """The run's name in the database and its result's file."""
        kind = "train" if self.task is None else f"tune-{self.task}"
        return f"{self.size.name}-{kind}-{self.method}-seed{self.seed}"

    @property
    def start(self) -> str | None:
        """The name of the pre-training that fine-tuning starts from."""
        return None if self.task is None else replace(self, method="fp32", task=None).name

    @property
    def cost(self) -> float:
        """What it takes, in products of one parameter of the blocks with one input; a backward pass is two forward."""
        if self.task is not None:
            read = 3.0 * self.size.tuning_steps * 2 * self.size.batch + HELD_OUT
            return self.size.parameters * tasks.BYTES_PER_TEXT * read
        read = 3.0 * self.size.steps * self.size.batch + 4 * self.size.batch * self.validation_batches
        return self.size.parameters * self.size.context * read


METHODS: dict[str, tuple[Recipe | None, fp8core.FormatPair]] = {
    "fp32": (None, fp8core.GRAPHCORE),
    "bf16": (None, fp8core.GRAPHCORE),
    "amax-graphcore": (fp8core.AmaxScaling(), fp8core.GRAPHCORE),
    "amax-hybrid": (fp8core.AmaxScaling(), fp8core.HYBRID),
    "amax-margin-3-all": (fp8core.AmaxScaling.paper_fig1(), fp8core.GRAPHCORE),
    "amax-margin-0-all": (fp8core.AmaxScaling(margin_grad_output=0), fp8core.GRAPHCORE),
    "current": (fp8core.CurrentScaling(), fp8core.GRAPHCORE),
    "delayed": (fp8core.DelayedScaling(), fp8core.GRAPHCORE),
    # FP8-AMAX with the scale of the step before, without a margin.
    "stale": (fp8core.DelayedScaling(history_len=1, algo="most_recent", power_of_two=True), fp8core.GRAPHCORE),
}


def method_of(name: str) -> tuple[Recipe | None, fp8core.FormatPair]:
    """What `METHODS` has, or the constant of a name such as "constant-3"."""
    if name.startswith("constant"):
        return fp8core.ConstantScaling(int(name.removeprefix("constant"))), fp8core.GRAPHCORE
    return METHODS[name]


class Classifier(nn.Module):
    """A GPT whose last position answers; `forward` gives logits [batch, classes]."""

    def __init__(self, gpt: Gpt, classes: int) -> None:
        super().__init__()
        self.gpt = gpt
        self.answer = nn.Linear(gpt.head.in_features, classes)

    def forward(self, x_BT: Tensor) -> Tensor:
        """Logits of the texts `x_BT`."""
        logits_BK: Tensor = self.answer(self.gpt.features(x_BT)[:, -1])
        return logits_BK


def in_blocks(_: nn.Module, name: str) -> bool:
    """The filter of what is cast to FP8: the four linear layers of each block, not the heads."""
    return "blocks." in name


def new_gpt(size: Size) -> Gpt:
    return Gpt(size.layers, size.width, size.heads, size.context)


def run(job: Job, *, collector: str, folder: Path) -> dict[str, float | int | str]:
    """Trains, streams to `collector`, keeps the weights in `folder`/weights, and returns what the run came to."""
    began, began_cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    recipe, formats = method_of(job.method)
    gpt = new_gpt(job.size)
    model: nn.Module = gpt
    task = None
    if job.task is None:
        text, held_out = standard_library_bytes()
        data = batches(text, job.size.batch, job.size.context, job.seed, CPU)
    else:
        task = tasks.load(job.task, train=20_000, held_out=HELD_OUT)
        gpt.load_state_dict(torch.load(folder / "weights" / f"{job.start}.pt"))
        model = Classifier(gpt, task.classes)
        data = task.batches(2 * job.size.batch, job.seed)
    if recipe is not None:
        fp8core.convert_to_fp8(model, recipe=recipe, formats=formats, module_filter_fn=in_blocks)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.method == "bf16"):
            if isinstance(model, Classifier):
                return F.cross_entropy(model(x).float(), y)
            loss: Tensor = model(x, y)
            return loss

    steps = job.size.steps if task is None else job.size.tuning_steps
    peak = job.size.lr if task is None else job.size.lr / 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    monitor = fp8scope.attach(
        *(model,),
        run=job.name,
        project=PROJECT,
        collector=collector,
        spool_dir=folder / "spool" / job.name,
        config={"method": job.method, "seed": job.seed, "size": job.size.name, "loss_scale": job.loss_scale},
        # What FP8-AMAX would have done: the high-precision runs are recorded, too, and those that are asked how scales
        # move at every step.
        shadow=fp8scope.Shadow(fp8core.AmaxScaling(), formats, in_blocks) if recipe is None else None,
        every=1 if recipe is not None or (job.seed == 0 and job.task is None) else 4,
    )
    final: dict[str, float] = {}
    with monitor:
        for step in range(steps):
            loss = loss_of(*next(data))
            (loss * job.loss_scale).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            gradients = [each.grad for each in model.parameters() if each.grad is not None]
            torch._foreach_div_(gradients, job.loss_scale)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scalars = {"loss": loss.detach(), "learning_rate": schedule.get_last_lr()[0]}
            schedule.step()
            if step + 1 == steps:
                if task is None:
                    final = {"validation_loss": validation_loss(model, loss_of, held_out, job)}
                else:
                    final = {"accuracy": accuracy(model, task)}
            monitor.step(step, **scalars, **final)
            keep_pace(monitor, step)
    state = monitor.snapshot()
    if job.method in ("fp32", "amax-graphcore"):
        (folder / "weights").mkdir(exist_ok=True)
        torch.save(model.state_dict(), folder / "weights" / f"{job.name}.pt")
    return {
        "name": job.name,
        "parameters": sum(each.numel() for each in model.parameters()),
        "steps": steps,
        **final,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "rows_recorded": state.rows_recorded,
        "rows_sent": state.rows_sent,
        "rows_dropped": sum(state.rows_dropped.values()),
    }


def keep_pace(monitor: fp8scope.Monitor, step: int) -> None:
    """Waits for steps to be written, ten seconds at most: a job would go on and drop some, a study needs them all."""
    deadline = time.monotonic() + 10
    while step - (monitor.snapshot().step or 0) > STEPS_AHEAD and time.monotonic() < deadline:
        time.sleep(0.001)


@torch.no_grad()
def validation_loss(model: nn.Module, loss_of: LossOf, held_out: Tensor, job: Job) -> float:
    """Mean loss over the same held-out windows for every run of a size, in nats a byte."""
    model.eval()  # in eval mode nothing is recorded
    data: Iterator[tuple[Tensor, Tensor]] = batches(held_out, 4 * job.size.batch, job.size.context, 0, CPU)
    total = math.fsum(float(loss_of(*next(data))) for _ in range(job.validation_batches))
    model.train()
    return total / job.validation_batches


@torch.no_grad()
def accuracy(model: nn.Module, task: tasks.Task) -> float:
    """The part of the held-out examples that the model gets right, in percent."""
    model.eval()
    right = sum(
        int((model(x.long()).argmax(1) == y).sum())
        for x, y in zip(torch.split(task.held_out_x, 256), torch.split(task.held_out_y, 256), strict=True)
    )
    model.train()
    return 100 * right / len(task.held_out_y)
