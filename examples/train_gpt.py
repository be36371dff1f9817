"""Trains a small byte-level GPT in FP8 on the source of Python's standard library, watched by fp8scope.

The text is on every machine that can run this: the `.py` files beside `os.py`, one in twenty held out for the
validation loss. What a job of your own needs from this file is four lines: `convert_to_fp8`, `attach`,
`monitor.step` and leaving the `with` block. The rest is an ordinary training loop: fp32 master weights, bf16
autocast, AdamW, a cosine schedule. The linear layers of the blocks run in FP8, three GEMMs each; embeddings,
attention products, norms and the output head stay in bf16, as in arXiv 2309.17224.

    python examples/train_gpt.py --steps 200                      # streams to a collector at 127.0.0.1:4327
    python examples/train_gpt.py --steps 200 --precision bf16     # the same model and data, without FP8
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor, nn

import fp8core
import fp8scope_agent as fp8scope
from fp8core.recipes import Recipe

HELD_OUT_EVERY = 20  # files
RECIPES: dict[str, Callable[[], Recipe]] = {
    "amax": fp8core.AmaxScaling,
    "amax-fig1": fp8core.AmaxScaling.paper_fig1,
    "constant": fp8core.ConstantScaling,
    "current": fp8core.CurrentScaling,
    "delayed": fp8core.DelayedScaling,
}
FORMAT_PAIRS = {pair.name: pair for pair in (fp8core.HYBRID, fp8core.E4M3, fp8core.GRAPHCORE)}


# The data: bytes of the standard library ---------------------------------------------------------------------------


@functools.cache
def standard_library_bytes() -> tuple[Tensor, Tensor]:
    """Training and held-out text, uint8 [bytes] each; the split is by file and the same on every call."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, path in enumerate(standard_library_files()):
        parts[index % HELD_OUT_EVERY == 0].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def standard_library_files() -> list[Path]:
    """The library's modules without its tests, in the order that the split counts them."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    return sorted(path for path in stdlib.rglob("*.py") if skipped.isdisjoint(path.relative_to(stdlib).parts))


def batches(text: Tensor, batch: int, context: int, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of `text` and the bytes that follow, int64 [batch, context] each."""
    generator = torch.Generator().manual_seed(seed)
    offsets_T = torch.arange(context + 1)
    while True:
        starts_B = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
        window_BT = text[starts_B + offsets_T].to(device, torch.int64)
        yield window_BT[:, :-1], window_BT[:, 1:]


# The model ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.qkv(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y_BHTD.transpose(1, 2).reshape(B, T, C))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTC)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.norm1(x_BTC))
        out: Tensor = x_BTC + self.mlp(self.norm2(x_BTC))
        return out


class Gpt(nn.Module):
    """A pre-norm GPT over bytes; its FP8 candidates are `blocks.N.{attn.qkv, attn.out, mlp.fc1, mlp.fc2}`."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attn.out.weight", "mlp.fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        """Mean cross entropy of the next byte, in nats, 0-d float32."""
        logits_BTV: Tensor = self.head(self.features(x_BT))
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), y_BT.flatten())

    def features(self, x_BT: Tensor) -> Tensor:
        """What the head reads of each byte, [batch, context, width]."""
        h_BTC = self.token(x_BT) + self.position(torch.arange(x_BT.shape[1], device=x_BT.device))
        for block in self.blocks:
            h_BTC = block(h_BTC)
        out_BTC: Tensor = self.norm(h_BTC)
        return out_BTC


# Training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a run came to; `--result` writes it as JSON."""

    run: str
    steps: int
    train_loss: float
    validation_loss: float
    seconds: float
    agent_share: float  # CPU time of the agent in this process / wall time of the training steps
    rows_recorded: int
    rows_sent: int
    rows_dropped: int


@dataclass
class Job:
    """A training in progress, for whoever wants to reach into it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR


def train(
    args: argparse.Namespace,
    *,
    before_step: Callable[[Job, int], None] = lambda job, step: None,
    conversion: dict[str, Any] | None = None,
) -> Result:
    """Trains as `args` say; `conversion` are other arguments of `convert_to_fp8` than these make."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_text, held_out = standard_library_bytes()
    model = Gpt(args.layers, args.width, args.heads, args.context).to(device)
    if args.precision == "fp8":
        fp8core.convert_to_fp8(
            model,
            formats=FORMAT_PAIRS[args.formats],
            module_filter_fn=lambda _, name: name.startswith("blocks."),
            **(conversion or {"recipe": RECIPES[args.recipe]()}),
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))

    def loss_of(x_BT: Tensor, y_BT: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: Tensor = model(x_BT, y_BT)
        return loss

    @torch.no_grad()
    def validation_loss() -> float:
        model.eval()  # in eval mode nothing is recorded
        data = batches(held_out, args.batch, args.context, seed=0, device=device)
        losses = torch.stack([loss_of(*next(data)) for _ in range(args.validation_batches)])
        model.train()
        return float(losses.mean())

    data = batches(train_text, args.batch, args.context, args.seed, device)
    loss, held_out_loss, stepping_s = torch.zeros((), device=device), math.nan, 0.0
    with (
        fp8scope.attach(
            model, run=args.run, collector=args.collector, spool_dir=args.spool_dir, config=vars(args)
        ) as monitor,
        progress_line(args) as show,
    ):
        for step in range(args.steps):
            before_step(Job(model, optimizer, schedule), step)
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*next(data))
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            scalars = {"loss": loss, "grad_norm": grad_norm, "learning_rate": schedule.get_last_lr()[0]}
            elapsed = time.perf_counter() - started
            if step + 1 == args.steps or (args.validate_every and (step + 1) % args.validate_every == 0):
                scalars["validation_loss"] = held_out_loss = validation_loss()
            started = time.perf_counter()
            monitor.step(step, **scalars)
            elapsed += time.perf_counter() - started
            stepping_s += elapsed
            show(step, loss, args.batch * args.context / elapsed, monitor.snapshot())
    final = monitor.snapshot()
    return Result(
        run=args.run,
        steps=args.steps,
        train_loss=float(loss.detach()),
        validation_loss=held_out_loss,
        seconds=stepping_s,
        agent_share=final.agent_cpu_s / stepping_s if stepping_s else 0.0,
        rows_recorded=final.rows_recorded,
        rows_sent=final.rows_sent,
        rows_dropped=sum(final.rows_dropped.values()),
    )


def learning_rate(step: int, steps: int, *, warmup: int = 20, floor: float = 0.1) -> float:
    """The factor on the peak rate: a linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# Progress ----------------------------------------------------------------------------------------------------------

Show = Callable[[int, Tensor, float, "fp8scope.Snapshot"], None]


@contextmanager
def progress_line(args: argparse.Namespace) -> Iterator[Show]:
    """A function to call after each step: a live bar on a terminal, elsewhere a line every tenth of the run."""
    console = Console(highlight=False, soft_wrap=True)
    every = max(1, args.steps // 10)
    shown_at = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(step: int, loss: Tensor, tokens_per_s: float, state: fp8scope.Snapshot) -> None:
            nonlocal shown_at
            due = (step + 1) % every == 0 or step + 1 == args.steps
            if not due and (not console.is_terminal or time.monotonic() < shown_at + 0.2):
                return  # reading the loss waits for the device: not at every step
            shown_at = time.monotonic()
            text = Text(progress_text(step, args.steps, float(loss.detach()), tokens_per_s, state))
            if console.is_terminal:
                live.update(text, refresh=True)
            if due:
                console.print(text)

        yield show


def progress_text(step: int, steps: int, loss: float, tokens_per_s: float, state: fp8scope.Snapshot) -> str:
    done = round(12 * (step + 1) / steps)
    parts = [
        f"{'━' * done}{'─' * (12 - done)} step {step + 1}/{steps}",
        f"loss {loss:.3f}",
        f"{tokens_per_s:,.0f} tokens/s".replace(",", " "),
    ]
    if state.worst_layer:
        parts.append(f"tightest {state.worst_role} {state.worst_layer} {state.worst_headroom:+.2f} bits")
        parts.append(f"overflow {state.overflow} underflow {state.underflow}")
    parts.append(f"rows sent {state.rows_sent} of {state.rows_recorded}, dropped {sum(state.rows_dropped.values())}")
    return "  ".join(parts)


# Command line ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the training itself; `demo.py` offers the same ones."""
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order (default %(default)s)")
    parser.add_argument("--precision", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument(
        "--recipe", choices=sorted(RECIPES), default="amax", help="scaling recipe (default %(default)s)"
    )
    parser.add_argument(
        "--formats", choices=sorted(FORMAT_PAIRS), default="HYBRID", help="FP8 formats (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="d_model (default %(default)s)")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=256, help="bytes (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    parser.add_argument(
        "--validate-every", type=int, default=100, metavar="STEPS", help="0: only after the last (default %(default)s)"
    )
    parser.add_argument("--validation-batches", type=int, default=8)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT in FP8, watched by fp8scope.")
    add_arguments(parser)
    parser.add_argument("--run", help="name of the run (default: precision, seed and time)")
    parser.add_argument("--collector", metavar="HOST:PORT", help="where rows go (default: FP8SCOPE_COLLECTOR)")
    parser.add_argument("--spool-dir", metavar="DIR", help="where rows wait (default: FP8SCOPE_SPOOL_DIR)")
    parser.add_argument("--result", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args(argv)
    for name in ("steps", "layers", "width", "heads", "context", "batch", "validation_batches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    if args.width % args.heads or args.width % 16:
        parser.error(f"--width is {args.width}; expected a multiple of 16 and of --heads ({args.heads})")
    args.run = args.run or time.strftime(f"gpt-{args.precision}-seed{args.seed}-%Y%m%d-%H%M%S")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        result = train(args)
    except KeyboardInterrupt:
        print(f"stopped; what was recorded of {args.run!r} is kept", file=sys.stderr)
        return 130
    print(
        f"{args.steps} steps in {result.seconds:.0f} s: loss {result.train_loss:.4f}, "
        f"validation loss {result.validation_loss:.4f}"
    )
    if args.result:
        try:
            args.result.write_text(json.dumps(asdict(result)))
        except OSError as error:
            print(f"cannot write {args.result}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
