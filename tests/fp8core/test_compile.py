"""torch.compile and activation checkpointing change no payload and no counter, and nothing is counted twice.

Most runs use the backend aot_eager, which compiles in a second and takes the same path through autograd; Inductor with
emulate_precision_casts (without it Inductor keeps bfloat16 intermediates in float32) has one short test and a long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from fp8core import AmaxScaling, CurrentScaling, DelayedScaling, Fp8Linear, StatsArena, convert_to_fp8
from fp8core.formats import E4M3FN
from fp8core.quantize import quantize
from fp8core.recipes import Recipe
from fp8core.records import COLUMNS, Role

INTEGERS_AND_SCALES = COLUMNS.index("sum_sq")  # the columns before it are exact, the sums of squares close


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, 2 * d)
        self.fc2 = nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class Net(nn.Module):
    """Equal blocks, each checkpointed in the reentrant or the other way, or not at all."""

    def __init__(self, blocks: int, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(16) for _ in range(blocks)])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@dataclass
class Outcome:
    """What two steps left behind."""

    words: torch.Tensor
    gradients: list[torch.Tensor]
    states: list[torch.Tensor]

    def assert_equals(self, other: Outcome) -> None:
        assert torch.equal(self.words[:, :INTEGERS_AND_SCALES], other.words[:, :INTEGERS_AND_SCALES])
        assert all(map(torch.equal, self.gradients, other.gradients))
        assert all(map(torch.equal, self.states, other.states))


def train(
    model: nn.Module, backend: str | None = None, *, by_block: bool = False, dynamic: bool | None = None
) -> Outcome:
    """Two micro-batches of forward and backward."""
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    arena = StatsArena(3 * len(layers))
    for index, layer in enumerate(layers):
        layer.bind_stats(arena, {role: 3 * index + offset for offset, role in enumerate(Role)})
    generator = torch.Generator().manual_seed(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if backend and by_block:
        for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
            block.compile(backend=backend, fullgraph=True)
    elif backend:
        model.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        model(torch.randn(8, 16, generator=generator).bfloat16().requires_grad_()).square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    states = [buffer.clone() for name, buffer in model.named_buffers() if "fp8_state" in name]
    return Outcome(arena.words, gradients, states)


def build(blocks: int = 3, reentrant: bool | None = None, recipe: Recipe | None = None) -> nn.Module:
    torch.manual_seed(0)
    return convert_to_fp8(Net(blocks, reentrant).bfloat16(), recipe=recipe or AmaxScaling())


@pytest.fixture(autouse=True)
def _rounding_as_in_eager() -> Iterator[None]:
    with torch._inductor.config.patch(emulate_precision_casts=True):
        yield


RECIPES: list[Recipe] = [AmaxScaling(), CurrentScaling(), DelayedScaling(history_len=3)]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once_and_repeats_the_same_casts(recipe: Recipe, reentrant: bool) -> None:
    plain = train(build(recipe=recipe))

    checkpointed = train(build(reentrant=reentrant, recipe=recipe))

    assert plain.words[:, 0].tolist() == [2, 1, 2] * 6
    checkpointed.assert_equals(plain)


CHECKPOINTING = pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["plain", "checkpointed", "checkpointed, reentrant"]
)


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@CHECKPOINTING
def test_whole_model_in_one_graph_equals_eager(recipe: Recipe, reentrant: bool | None) -> None:
    eager = train(build(recipe=recipe))

    compiled = train(build(reentrant=reentrant, recipe=recipe), "aot_eager")

    compiled.assert_equals(eager)
    assert_graphs(1)


@CHECKPOINTING
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_twelve_equal_blocks_share_one_graph_each_counted_once(reentrant: bool | None, budget: float) -> None:
    eager = train(build(blocks=12))

    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = train(build(blocks=12, reentrant=reentrant), "aot_eager", by_block=True)

    compiled.assert_equals(eager)
    assert compiled.words[:, 0].tolist() == [2, 1, 2] * 24
    # Reentrant checkpointing runs a block without gradients first and with them in the backward: a graph for each.
    assert_graphs(2 if reentrant else 1)


@CHECKPOINTING
def test_the_compilers_own_recomputation_is_not_counted(reentrant: bool | None) -> None:
    eager = train(build())

    with torch._functorch.config.patch(activation_memory_budget=0.1):
        compiled = train(build(reentrant=reentrant), "aot_eager")

    compiled.assert_equals(eager)
    assert_graphs(1)


def assert_graphs(count: int) -> None:
    """So many in all: none was broken, and none compiled again for another block or step."""
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == count
    assert not counters["graph_break"]


def test_batches_of_any_size_run_in_one_dynamic_graph() -> None:
    eager = train(build())

    compiled = train(build(), "aot_eager", dynamic=True)

    compiled.assert_equals(eager)


def test_inductor_gives_the_same_bits() -> None:
    eager = train(build(blocks=1))

    compiled = train(build(blocks=1), "inductor")

    compiled.assert_equals(eager)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("reentrant", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_inductor_gives_the_same_bits_with_checkpointing_and_recomputation(
    recipe: Recipe, reentrant: bool | None, budget: float
) -> None:
    eager = train(build(recipe=recipe))

    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = train(build(reentrant=reentrant, recipe=recipe), "inductor")

    compiled.assert_equals(eager)


class Twice(nn.Module):
    """One layer used twice, and one tied to it by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tied = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied.weight = self.fc.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.tied(self.fc(self.fc(x).relu()))
        return out


class Checkpointed(Twice):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return out


@pytest.mark.parametrize("kind", [Twice, Checkpointed])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_a_module_used_twice_and_a_tied_weight_are_counted_alike_in_eager_and_compiled(
    kind: type[Twice], budget: float
) -> None:
    def build_it(kind: type[Twice]) -> nn.Module:
        torch.manual_seed(0)
        return convert_to_fp8(kind().bfloat16())

    eager = train(build_it(Twice))

    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = train(build_it(kind), "aot_eager")

    assert eager.words[:, 0].tolist() == [4, 1, 4, 2, 1, 2]
    compiled.assert_equals(eager)
    assert_graphs(1)


def test_a_cast_whose_result_nobody_uses_stays_in_the_graph() -> None:
    arena, slot = StatsArena(1), torch.tensor(0)
    recipe = repr(AmaxScaling())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def tap(x: torch.Tensor) -> torch.Tensor:
        quantize(x, recipe=recipe, role="input", fmt="E4M3FN", arena=arena.handle, slot=slot)
        return x + 1

    tap(torch.randn(4, 4))
    tap(torch.randn(4, 4))

    assert arena.words[0, 0] == 2


def test_pausing_an_arena_compiles_nothing_anew() -> None:
    arena, slot = StatsArena(1), torch.tensor(0)
    recipe = repr(AmaxScaling())
    torch._dynamo.utils.counters.clear()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def tap(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, recipe=recipe, role="input", fmt="E4M3FN", arena=arena.handle, slot=slot)[0].float()

    for arena.recording in (True, False, True):
        tap(torch.randn(4, 4))

    assert arena.words[0, 0] == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operation_alone_is_bit_equal_without_any_flag() -> None:
    x, recipe = torch.randn(64, 64).bfloat16(), repr(CurrentScaling())

    @torch.compile(fullgraph=True)
    def cast(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, recipe=recipe, role="input", fmt="E4M3FN")[0]

    with torch._inductor.config.patch(emulate_precision_casts=False):
        compiled = cast(x)

    q, _ = quantize(x, recipe=CurrentScaling(), role="input", fmt=E4M3FN)
    assert torch.equal(compiled.view(torch.uint8), q.view(torch.uint8))
