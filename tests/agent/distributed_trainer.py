"""One of two ranks that train the same small model, watched, under DDP, FSDP2 and tensor parallelism.

Arguments: a folder, the collector's address. Started by torchrun, in test_distributed_agent.py. Writes the losses of
each scenario as JSON to losses-RANK.json in the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

import fp8scope_agent as fp8scope
from fp8core import AmaxScaling, convert_to_fp8

D, STEPS = 32, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 2 * D)
        self.fc2 = nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.fc2(self.fc1(x).relu())
        return out


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    if kind == "native":
        return convert_to_fp8(model)
    if kind == "torchao":
        return convert_to_float8_training(model.bfloat16(), config=Float8LinearConfig(emulate=True))
    return model


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fully_sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[no-any-return]


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def train(model: nn.Module, monitor: fp8scope.Monitor | None, seed: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    losses = []
    for _ in range(STEPS):
        for _ in range(2):  # micro-batches
            loss = model(torch.randn(8, D, generator=generator).to(dtype)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step(loss=loss)
    return losses


SCENARIOS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "native ddp": ("native", data_parallel),
    "native fsdp2": ("native", fully_sharded),
    "shadow ddp": ("plain", data_parallel),
    "shadow fsdp2": ("plain", fully_sharded),
    "shadow tp": ("plain", tensor_parallel),
    "torchao ddp": ("torchao", data_parallel),
    "torchao fsdp2": ("torchao", fully_sharded),
}


def main() -> None:
    folder, collector = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    losses = {}
    for name, (kind, wrap) in SCENARIOS.items():
        seed = 0 if wrap is tensor_parallel else rank
        alone = train(wrap(build(kind)), None, seed)
        model = wrap(build(kind))
        with fp8scope.attach(model, run=name, collector=collector, shadow=AmaxScaling()) as monitor:
            losses[name] = (alone, train(model, monitor, seed))
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


main()
