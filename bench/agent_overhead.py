"""What watching costs: the demo's GPT with and without the agent, beside what one would use instead of it.

Each variant has a model of its own with the same weights. In each round every variant takes a turn of some steps, right
beside a turn of what it is compared with, each after a step that is not timed (in which the work falls that the turn
before left to its threads), while a sender and a real collector run on the same machine. A ratio is of such two turns,
so that a machine that gets slower does not show as a cost. "cpu" is the same ratio in processor time of the training
thread: what other processes do moves it less, but waiting for the interpreter's lock is not in it.

    native, shadow     all statistics of every tensor, at every step and at every tenth, against the same Fp8Linear
                       model that nobody watches, and the plain model
    histograms         native, with the histograms of every tensor at every step: a 1/M of it is what every M-th costs
    hooks with item()  amax, zeros, overflow and underflow of every tensor by torch operations and `.item()`
    tensorboard        SummaryWriter.add_histogram of every parameter and gradient
    wandb              wandb.watch(model, log="all", log_freq=1) offline, and wandb.log
    torchao            Float8Linear, emulated, which keeps no statistics

And `Monitor.step` alone, at the slots of a 70B model, and how short steps may be before rows are dropped.

    python bench/agent_overhead.py                          # about 10 minutes
    python bench/agent_overhead.py --only shadow            # 2 minutes; replaces these lines of the results
    python bench/agent_overhead.py --rounds 1 --batch 1     # a try; writes nothing

The results are in bench/results/agent_overhead.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import fp8core
import fp8scope_agent as fp8scope
from fp8core.formats import E4M3FN, E5M2, Fp8Format
from measured import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import Gpt, batches, standard_library_bytes

LAYERS, WIDTH, HEADS, CONTEXT = 6, 384, 6, 256  # the demo's
EVERY = 10  # steps of a turn where every tenth is recorded
SLOTS_OF_70B = 1680  # 80 blocks, 7 linear layers each, 3 tensors each
CALLS_OF_70B = 200
SHORT_STEPS = 2000

ENVIRONMENT = Path(__file__).resolve().parents[1] / ".venv-bench"  # where the peers are: `make bench` makes it
RESULTS = Path(__file__).resolve().parent / "results" / "agent_overhead.json"
CALLS, SHORT = "70b", "short_steps"  # what else is measured, and its name in the results
NATIVE, PLAIN = "native, nobody watches", "plain, nobody watches"

Watch = Callable[[int, Tensor], None]  # called after each step with its number and its loss


class Variant:
    """One model in training, and how it is watched."""

    def __init__(self, name: str, against: str, model: nn.Module, watch: Watch, batch: int, steps: int = 4) -> None:
        self.name = name
        self.against = against
        self.steps = steps  # a turn
        self.ratios: list[tuple[float, float]] = []  # to what it is compared with: wall time, processor time
        self.seconds: list[float] = []  # a step, wall time
        self._model = model
        self._watch = watch
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self._data = batches(standard_library_bytes()[0], batch, CONTEXT, seed=0, device=torch.device("cpu"))
        self._step = 0

    def turn(self) -> tuple[float, float]:
        """Seconds a step of one turn: wall time, and processor time of this thread."""
        self._train_step()
        began, began_cpu = time.perf_counter(), time.thread_time()
        for _ in range(self.steps):
            self._train_step()
        seconds = (time.perf_counter() - began) / self.steps, (time.thread_time() - began_cpu) / self.steps
        self.seconds.append(seconds[0])
        return seconds

    def compare(self, base: Variant, *, first: bool) -> None:
        """Takes a turn beside one of `base`'s, before it if `first`."""
        mine, its = (self.turn(), base.turn()) if first else reversed((base.turn(), self.turn()))
        self.ratios.append((mine[0] / its[0], mine[1] / its[1]))

    def _train_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self._model(*next(self._data))
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._watch(self._step, loss)
        self._step += 1


def variants(address: str, folder: Path, batch: int, exits: contextlib.ExitStack) -> dict[str, Callable[[], Variant]]:
    """How each variant is made: a model takes 130 MB with its optimizer, and only those that are asked for exist."""

    def attached(
        name: str, against: str, model: nn.Module, *, every: int = 1, histograms: int = 0, shadow: bool = False
    ) -> Variant:
        monitor = fp8scope.attach(
            model,
            run=name,
            collector=address,
            spool_dir=folder / "spool",
            every=every,
            histogram_every=histograms,
            burst=0,
            shadow=fp8core.AmaxScaling() if shadow else None,
        )
        exits.enter_context(monitor)

        def watch(step: int, loss: Tensor) -> None:
            monitor.step(step, loss=loss)

        return Variant(name, against, model, watch, batch, steps=4 if every == 1 else EVERY)

    def nothing(step: int, loss: Tensor) -> None:
        pass

    def hooked(name: str) -> Variant:
        model = plain()
        return Variant(name, PLAIN, model, Hooks(model), batch, steps=1)

    def peer(name: str, make: Callable[[nn.Module, Path, contextlib.ExitStack], Watch]) -> Variant:
        model = plain()
        return Variant(name, PLAIN, model, make(model, folder, exits), batch, steps=1)

    makers: dict[str, Callable[[str], Variant]] = {
        NATIVE: lambda name: Variant(name, "", native(), nothing, batch),
        "native, every step": lambda name: attached(name, NATIVE, native()),
        "native, every=10": lambda name: attached(name, NATIVE, native(), every=EVERY),
        "native, every step with histograms": lambda name: attached(name, NATIVE, native(), histograms=1),
        PLAIN: lambda name: Variant(name, "", plain(), nothing, batch),
        "shadow, every step": lambda name: attached(name, PLAIN, plain(), shadow=True),
        "shadow, every=10": lambda name: attached(name, PLAIN, plain(), every=EVERY, shadow=True),
        "hooks with .item()": hooked,
        "tensorboard histograms": lambda name: peer(name, tensorboard),
        "wandb.watch(log='all')": lambda name: peer(name, wandb_watch),
        "torchao, no statistics": lambda name: Variant(name, PLAIN, torchao(), nothing, batch, steps=1),
    }
    return {name: functools.partial(make, name) for name, make in makers.items()}


def contestants_of(makers: dict[str, Callable[[], Variant]], only: str) -> dict[str, Variant]:
    """The variants with `only` in their names, each after what it is compared with; without peers that are missing."""
    found: dict[str, Variant] = {}
    for name, make in makers.items():
        if only in name:
            try:
                variant = make()
            except ImportError as error:
                print(f"left out: {name}: {error}; `make bench` installs it", file=sys.stderr)
                continue
            if variant.against and variant.against not in found:
                found[variant.against] = makers[variant.against]()
            found.setdefault(name, variant)
    return found


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Gpt(LAYERS, WIDTH, HEADS, CONTEXT)


def native() -> nn.Module:
    model = plain()
    fp8core.convert_to_fp8(model, module_filter_fn=lambda _, name: name.startswith("blocks."))
    return model


def torchao() -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = plain()
    config = Float8LinearConfig(emulate=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name.startswith("blocks."), config=config)
    return model


class Hooks:
    """What one writes oneself: statistics of the three tensors of each linear layer, in torch, with `.item()`."""

    def __init__(self, model: nn.Module) -> None:
        self.step: dict[str, float] = {}
        self._model = [(name, module) for name, module in model.named_modules() if name.startswith("blocks.")]
        for name, module in self._model:
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._on_input(name))
                module.register_full_backward_hook(self._on_gradient(name))

    def __call__(self, step: int, loss: Tensor) -> None:
        for name, module in self._model:
            if isinstance(module, nn.Linear):
                self._note(f"{name}.weight", module.weight, E4M3FN)
        self.step["loss"] = loss.item()
        self.step.clear()

    def _on_input(self, name: str) -> Callable[..., None]:
        return lambda module, inputs: self._note(f"{name}.input", inputs[0], E4M3FN)

    def _on_gradient(self, name: str) -> Callable[..., None]:
        return lambda module, inputs, outputs: self._note(f"{name}.grad_output", outputs[0], E5M2)

    @torch.no_grad()
    def _note(self, name: str, x: Tensor, fmt: Fp8Format) -> None:
        amax = x.abs().max()
        scale = fmt.max / amax.float()
        scaled = x.float() * scale
        q = scaled.clamp(-fmt.max, fmt.max).to(getattr(torch, fmt.torch_dtype)).float()
        self.step |= {
            f"{name}.amax": amax.item(),
            f"{name}.zeros": (x == 0).sum().item(),
            f"{name}.overflow": (scaled.abs() > fmt.max).sum().item(),
            f"{name}.underflow": ((q == 0) & (x != 0)).sum().item(),
        }


def tensorboard(model: nn.Module, folder: Path, exits: contextlib.ExitStack) -> Watch:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    exits.callback(writer.close)

    def watch(step: int, loss: Tensor) -> None:
        writer.add_scalar("loss", loss.item(), step)
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter, step)
            if parameter.grad is not None:
                writer.add_histogram(f"{name}.grad", parameter.grad, step)

    return watch


def wandb_watch(model: nn.Module, folder: Path, exits: contextlib.ExitStack) -> Watch:
    os.environ["WANDB_SILENT"] = "true"
    import wandb  # type: ignore[import-not-found,unused-ignore]  # a peer, of bench/requirements.txt

    run = wandb.init(mode="offline", dir=str(folder))
    exits.callback(run.finish)
    run.watch(model, log="all", log_freq=1)
    return lambda step, loss: run.log({"loss": loss.item()})


def calls_of_70b(address: str, spool: Path) -> dict[str, float]:
    """`Monitor.step` with the slots of a 70B model, whose layers are tiny here: the agent does not see that."""
    model = fp8core.convert_to_fp8(nn.Sequential(*(nn.Linear(16, 16) for _ in range(SLOTS_OF_70B // 3))))
    x, times_ms = torch.randn(16, 16), []
    with fp8scope.attach(model, run="70b", collector=address, spool_dir=spool) as monitor:
        for _ in range(CALLS_OF_70B):
            loss = model(x).square().mean()
            torch.autograd.backward(loss)
            began = time.perf_counter()
            monitor.step(loss=loss)
            times_ms.append(1e3 * (time.perf_counter() - began))
        deadline = time.monotonic() + 30
        while monitor.snapshot().step != CALLS_OF_70B - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        snapshot = monitor.snapshot()
    cuts = statistics.quantiles(times_ms, n=100)
    return {
        "slots": SLOTS_OF_70B,
        "step_call_median_ms": round(cuts[49], 3),
        "step_call_p99_ms": round(cuts[98], 3),  # every 100th takes histograms
        "step_call_largest_ms": round(max(times_ms), 3),
        "agent_cpu_ms_per_step": round(1e3 * snapshot.agent_cpu_s / CALLS_OF_70B, 3),
        "rows_dropped": sum(snapshot.rows_dropped.values()),
    }


def short_steps(address: str, spool: Path, slots: int) -> dict[str, float]:
    """A loop of nothing but `Monitor.step`: how many steps a second the drain thread can record."""
    model = fp8core.convert_to_fp8(nn.Sequential(*(nn.Linear(16, 16) for _ in range(slots // 3))))
    logging.getLogger("fp8scope").setLevel(logging.ERROR)
    with fp8scope.attach(
        model, run=f"short-{slots}", collector=address, spool_dir=spool, histogram_every=0, burst=0
    ) as monitor:
        (arena,) = monitor._tap.arenas  # as the casts of a step would leave it
        written = torch.ones_like(arena.words)
        began = time.perf_counter()
        for _ in range(SHORT_STEPS):
            arena.words.copy_(written)
            monitor.step()
        seconds = time.perf_counter() - began
    dropped = monitor.snapshot().rows_dropped.get("ring_full", 0) / slots
    logging.getLogger("fp8scope").setLevel(logging.WARNING)
    return {"slots": slots, "recorded_steps_per_s": round((SHORT_STEPS - dropped) / seconds)}


@contextmanager
def collector(folder: Path) -> Iterator[str]:
    """A collector of our own on a free port."""
    command = [sys.executable, "-m", "fp8scope_collector", "serve", "--db", f"sqlite:///{folder}/bench.db"]
    command += ["--grpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        match = None
        while match is None:
            line = process.stdout.readline()
            assert line, "the collector ended before it was ready"
            match = re.search(r"grpc (\S+?),", line)
        yield match[1]
    finally:
        process.terminate()
        process.wait(20)


def line_of(variant: Variant, rounds: int) -> dict[str, object]:
    line: dict[str, object] = {
        "variant": variant.name,
        "step_ms": round(1e3 * statistics.median(variant.seconds), 1),
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
        "month": datetime.datetime.now(datetime.UTC).strftime("%Y-%m"),
    }
    if variant.against:
        line["against"] = variant.against
        for name, ratios in zip(("ratio", "cpu"), zip(*variant.ratios, strict=True), strict=True):
            low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            line[name] = [round(median, 4), round(low, 4), round(high, 4)]  # median and quartiles
    return line


def race(contestants: dict[str, Variant], rounds: int) -> list[dict[str, object]]:
    for variant in contestants.values():
        variant.turn()  # warms up
        variant.seconds.clear()
    for round_number in range(rounds):
        for variant in contestants.values():
            if variant.against:
                variant.compare(contestants[variant.against], first=round_number % 2 == 1)
    return [line_of(variant, rounds) for variant in contestants.values()]


def publish(batch: int, lines: list[dict[str, object]], calls: dict[str, object]) -> None:
    """Into the results' file, where what was measured now replaces what was measured before, variant by variant."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    table = {line["variant"]: line for line in old.get("table", [])} | {str(line["variant"]): line for line in lines}
    gpt = {"layers": LAYERS, "width": WIDTH, "context": CONTEXT, "batch": batch, "slots": 12 * LAYERS}
    result = {
        "machine": machine("torch") + ", one training thread",
        "gpt": gpt,
        "table": list(table.values()),
        **{name: old[name] for name in (CALLS, SHORT) if name in old},
        **calls,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="What watching costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: the demo's %(default)s)")
    parser.add_argument("--only", default="", help=f"variants with this in their names, or {CALLS} or {SHORT}")
    arguments = parser.parse_args()
    python = ENVIRONMENT / "bin" / "python"
    if python.exists() and Path(sys.prefix) != ENVIRONMENT:
        os.execv(python, [str(python), *sys.argv])
    torch.set_num_threads(1)
    gc.freeze()
    calls: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name, collector(Path(name)) as address:
        folder = Path(name)
        with contextlib.ExitStack() as exits:
            contestants = contestants_of(variants(address, folder, arguments.batch, exits), arguments.only)
            lines = race(contestants, arguments.rounds)
        if arguments.only in CALLS:
            calls[CALLS] = calls_of_70b(address, folder / "spool")
        if arguments.only in SHORT:
            calls[SHORT] = [short_steps(address, folder / "spool", slots) for slots in (72, SLOTS_OF_70B)]
    print(json.dumps({"table": lines, **calls}, indent=2))
    if arguments.rounds > 1 and arguments.batch == parser.get_default("batch"):
        publish(arguments.batch, lines, calls)


if __name__ == "__main__":
    main()
