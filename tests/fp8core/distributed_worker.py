"""One of two processes that train the same small FP8 model under DDP or FSDP2; prints what it saw as JSON.

Arguments: rank, world size, a file for the rendezvous, which scenarios. Run by test_distributed.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fp8core import AmaxScaling, DelayedScaling, Fp8Linear, StatsArena, convert_to_fp8
from fp8core.recipes import Recipe
from fp8core.records import Role, decode_arena

D = 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 2 * D)
        self.fc2 = nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.fc2(self.fc1(x).relu())
        return out


class Net(nn.Module):
    """Blocks, each checkpointed in the reentrant or the other way, or not at all."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def build(recipe: Recipe, reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return convert_to_fp8(Net(reentrant), recipe=recipe)


def shard(model: nn.Module, policy: MixedPrecisionPolicy | None = None, *, compiled: bool = False) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
        if compiled:
            block.compile(backend="aot_eager", fullgraph=True)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def watch(model: nn.Module) -> StatsArena:
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    arena = StatsArena(3 * len(layers))
    for index, layer in enumerate(layers):
        layer.bind_stats(arena, {role: 3 * index + offset for offset, role in enumerate(Role)})
    return arena


def train_step(model: nn.Module, arena: StatsArena, rank: int, micro_batches: int = 1) -> dict[str, Any]:
    """Forward and backward; what the arena, the gradients and autograd hold afterwards."""
    generator = torch.Generator().manual_seed(rank)
    kept_for_backward = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float8_e4m3fn:
            kept_for_backward.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(micro_batches):
            model(torch.randn(8, D, generator=generator).requires_grad_()).square().mean().backward()
    rows = decode_arena(arena.words.numpy())
    full = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return {
        "writes": arena.words[:, 0].tolist(),
        "amax": rows.columns["amax"].tolist(),
        "scale": rows.columns["scale_max"].tolist(),
        "overflow": int(rows.columns["overflow"].sum()),
        "grads": [grad.double().norm().item() for grad in full if grad is not None],
        "kept": sorted(kept_for_backward),
    }


def scenarios(rank: int) -> dict[str, Any]:
    seen = {}
    amax = AmaxScaling()

    model = build(amax)
    arena = watch(model)
    seen["ddp"] = train_step(DistributedDataParallel(model), arena, rank)

    model = build(amax)
    arena = watch(model)
    seen["ddp, two micro-batches"] = train_step(DistributedDataParallel(model), arena, rank, micro_batches=2)

    model = build(amax)
    arena = watch(model)
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)  # several buckets: Dynamo makes a graph of each
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    seen["ddp, compiled"] = train_step(torch.compile(ddp, backend=backend), arena, rank)  # type: ignore[arg-type]
    seen["ddp graphs"] = len(graphs)

    model = build(DelayedScaling(history_len=4))
    arena = watch(model)
    ddp = DistributedDataParallel(model)
    train_step(ddp, arena, rank)
    arena.reset()
    seen["ddp, delayed"] = train_step(ddp, arena, rank)

    for name, compiled, fsdp_policy in (
        ("fsdp2", False, None),
        ("fsdp2, compiled", True, None),
        ("fsdp2, bfloat16", False, MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)),
    ):
        model = build(amax)
        arena = watch(model)
        seen[name] = train_step(shard(model, fsdp_policy, compiled=compiled), arena, rank)
    return seen


def recomputing(rank: int) -> dict[str, Any]:
    """Checkpointing of both kinds and the compiler's own recomputation, under DDP and FSDP2, eager and compiled."""
    seen = {}
    for reentrant in (False, True):
        kind = "reentrant" if reentrant else "checkpointed"
        for compiled in (False, True):
            model = build(AmaxScaling(), reentrant)
            arena = watch(model)
            ddp: nn.Module = DistributedDataParallel(model, bucket_cap_mb=1)
            if compiled:
                ddp.compile(backend="aot_eager")
            seen[f"ddp, {kind}{', compiled' * compiled}"] = train_step(ddp, arena, rank)

            model = build(AmaxScaling(), reentrant)
            arena = watch(model)
            seen[f"fsdp2, {kind}{', compiled' * compiled}"] = train_step(shard(model, compiled=compiled), arena, rank)
    with torch._functorch.config.patch(activation_memory_budget=0.1):
        model = build(AmaxScaling())
        arena = watch(model)
        ddp = DistributedDataParallel(model, bucket_cap_mb=1)
        ddp.compile(backend="aot_eager")
        seen["ddp, budget, compiled"] = train_step(ddp, arena, rank)

        model = build(AmaxScaling())
        arena = watch(model)
        seen["fsdp2, budget, compiled"] = train_step(shard(model, compiled=True), arena, rank)
    return seen


def main() -> None:
    rank, world_size, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    print(json.dumps({"usual": scenarios, "recomputing": recomputing}[sys.argv[4]](rank)))
    dist.destroy_process_group()


main()
