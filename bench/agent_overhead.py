"""What watching costs: a small GPT's steps with and without a monitor, and `Monitor.step` at the size of a 70B model.

"Without" is the same FP8 model that nobody attached to. Blocks of monitored and unmonitored steps alternate, with a
pause between them so that the drain thread's last work falls on neither; the ratio is of neighbouring blocks, so that a
machine that gets slower does not show as overhead. The sender and a collector run on the same machine meanwhile.

    python bench/agent_overhead.py          # writes bench/results/agent_overhead.json
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8core
import fp8scope_agent as fp8scope

PAIRS = 10
STEPS_PER_BLOCK = 4
PAUSE_S = 0.3
LAYERS, WIDTH, HEADS, BATCH, CONTEXT = 4, 384, 6, 4, 128
SLOTS_OF_70B = 1680  # 80 blocks, 7 linear layers each, 3 tensors each
STEPS_OF_70B = 60


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.qkv(self.norm1(x_BTC)).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(B, T, C))
        out: Tensor = x_BTC + self.fc2(F.gelu(self.fc1(self.norm2(x_BTC))))
        return out


def gpt() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, WIDTH), *(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, 256))
    fp8core.convert_to_fp8(model, module_filter_fn=lambda _, name: "." in name)
    return model


def block_s(model: nn.Module, optimizer: torch.optim.Optimizer, monitor: fp8scope.Monitor | None) -> float:
    """Seconds for STEPS_PER_BLOCK steps."""
    tokens = torch.randint(256, (BATCH, CONTEXT + 1))
    began = time.perf_counter()
    for _ in range(STEPS_PER_BLOCK):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        if monitor is not None:
            monitor.step(loss=loss)
    return time.perf_counter() - began


def step_ratio(collector: str, spool: Path) -> dict[str, float]:
    models = [gpt(), gpt()]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    ratios, plain_ms = [], []
    with fp8scope.attach(models[0], run="overhead", collector=collector, spool_dir=spool) as monitor:
        for pair in range(PAIRS + 1):
            seconds: dict[bool, float] = {}
            for watched in (True, False) if pair % 2 else (False, True):
                time.sleep(PAUSE_S)
                index = 0 if watched else 1
                seconds[watched] = block_s(models[index], optimizers[index], monitor if watched else None)
            if pair:  # the first warms up
                ratios.append(seconds[True] / seconds[False])
                plain_ms.append(1e3 * seconds[False] / STEPS_PER_BLOCK)
        snapshot = monitor.snapshot()
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "unmonitored_step_ms": round(statistics.median(plain_ms), 1),
        "ratio_quartile_1": round(low, 4),
        "ratio_median": round(median, 4),
        "ratio_quartile_3": round(high, 4),
        "agent_cpu_ms_per_step": round(1e3 * snapshot.agent_cpu_s / ((PAIRS + 1) * STEPS_PER_BLOCK), 3),
        "rows_dropped": sum(snapshot.rows_dropped.values()),
    }


def step_time(collector: str, spool: Path) -> dict[str, float]:
    model = fp8core.convert_to_fp8(nn.Sequential(*(nn.Linear(16, 16) for _ in range(SLOTS_OF_70B // 3))))
    x, times_ms = torch.randn(16, 16), []
    with fp8scope.attach(model, run="large", collector=collector, spool_dir=spool) as monitor:
        for _ in range(STEPS_OF_70B):
            loss = model(x).square().mean()
            torch.autograd.backward(loss)
            began = time.perf_counter()
            monitor.step(loss=loss)
            times_ms.append(1e3 * (time.perf_counter() - began))
        deadline = time.monotonic() + 30
        while monitor.snapshot().step != STEPS_OF_70B - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        snapshot = monitor.snapshot()
    times_ms.sort()
    return {
        "slots": SLOTS_OF_70B,
        "step_call_median_ms": round(statistics.median(times_ms), 4),
        "step_call_largest_ms": round(times_ms[-1], 4),
        "agent_cpu_ms_per_step": round(1e3 * snapshot.agent_cpu_s / STEPS_OF_70B, 3),
        "rows_dropped": sum(snapshot.rows_dropped.values()),
    }


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


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, collector(Path(name)) as address:
        result = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, one training thread",
            "month": datetime.datetime.now(datetime.UTC).strftime("%Y-%m"),
            "gpt": step_ratio(address, Path(name) / "spool"),
            "70b": step_time(address, Path(name) / "spool"),
        }
    out = Path(__file__).parent / "results" / "agent_overhead.json"
    out.parent.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
