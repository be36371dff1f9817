"""Shadow mode: the statistics that FP8 would have, of a model whose numbers do not change by a bit."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fp8core
import fp8scope_agent as fp8scope
from fake_collector import FakeCollector
from fp8core import AmaxScaling, ConstantScaling, CurrentScaling, DelayedScaling
from fp8core.formats import GRAPHCORE
from fp8core.recipes import Recipe
from fp8core.records import COLUMNS
from fp8scope_agent.adapters import native, shadow
from fp8scope_agent.adapters.tap import Tap, bind
from fp8scope_agent.ring import DEPTH

INTEGERS_AND_SCALES = COLUMNS.index("sum_sq")  # the columns before it are exact, the sums of squares close
RECIPES: list[Recipe] = [AmaxScaling(), ConstantScaling(scale_exp2=3), CurrentScaling(), DelayedScaling(history_len=3)]


class Block(nn.Module):
    """What real models have: no bias, a view in between, an activation in place."""

    def __init__(self, d: int, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d, 2 * d, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(2 * d, d)
        self.checkpointed = checkpointed  # True: in the reentrant way

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (
            self._run(x) if self.checkpointed is None else checkpoint(self._run, x, use_reentrant=self.checkpointed)
        )
        return out

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(x)))
        return out


def build(dtype: torch.dtype = torch.bfloat16, blocks: int = 2, checkpointed: bool | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(16, checkpointed) for _ in range(blocks))).to(dtype)


def shadowed(model: nn.Module, recipe: Recipe | None = None) -> Tap:
    return bind(model, [native.find, shadow.finder(shadow.Shadow(recipe or AmaxScaling()))])


def words(tap: Tap) -> Tensor:
    (arena,) = tap.arenas
    return arena.words


def train(model: nn.Module, steps: int, monitor: fp8scope.Monitor | None = None) -> list[float]:
    """A loop over data with two leading dimensions; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    losses = []
    for _ in range(steps):
        x = torch.randn(2, 4, 16, generator=generator).to(dtype).requires_grad_()
        loss = (model(x) - x.detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step(loss=loss)
            while len(losses) - (monitor.snapshot().step or 0) > DEPTH // 2:
                time.sleep(0.001)  # no step is dropped on a busy machine
    return losses


def step(model: nn.Module, micro_batches: int = 1) -> list[Tensor]:
    """Forward and backward without an update: the gradients."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        x = torch.randn(2, 4, 16, generator=generator).to(next(model.parameters()).dtype).requires_grad_()
        model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_curve_of_50_steps_is_the_same_to_the_bit(dtype: torch.dtype, collector: FakeCollector) -> None:
    alone, watched = build(dtype), build(dtype)
    losses = train(alone, 50)

    with fp8scope.attach(watched, run="run", collector=collector.address, shadow=AmaxScaling()) as monitor:
        watched_losses = train(watched, 50, monitor)

    assert watched_losses == losses
    assert all(map(torch.equal, alone.parameters(), watched.parameters()))
    assert len(collector.source.rows) == 50 * 12
    assert collector.source.open.slots[0].module_class == "Linear"
    assert [type(module) for module in watched.modules()] == [type(module) for module in alone.modules()]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_statistics_are_those_of_an_fp8_layer_that_gets_the_same_tensors(
    recipe: Recipe, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain, real = nn.Linear(16, 32).to(dtype), nn.Linear(16, 32).to(dtype)
    real.load_state_dict(plain.state_dict())
    fp8core.convert_to_fp8(real, recipe=recipe)
    taps = shadowed(plain, recipe), bind(real, [native.find])

    for scale in (1.0, 30.0, 0.01):  # so that delayed scales move
        x, dy = scale * torch.randn(8, 16).to(dtype), scale * torch.randn(8, 32).to(dtype)
        for layer in (plain, real):
            layer(x).backward(dy)

    assert words(taps[0])[:, 0].tolist() == [3, 1, 3]
    assert torch.equal(words(taps[0]), words(taps[1]))


def test_the_state_of_delayed_scaling_moves_on_in_steps_that_are_not_recorded() -> None:
    seen = []
    for recorded in ([True, True], [False, True]):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16)
        tap = shadowed(layer, DelayedScaling(history_len=3))
        for recording in recorded:
            tap.arenas[0].reset()
            tap.arenas[0].recording = recording
            layer(torch.randn(4, 16)).sum().backward()
        seen.append(words(tap).clone())

    assert torch.equal(*seen)
    assert seen[0][0, COLUMNS.index("scale_max")].view(torch.float64).item() != 1.0


def test_function_transforms_of_a_watched_model_give_what_they_gave_and_all_but_vmap_are_observed() -> None:
    plain, watched = build(torch.float32), build(torch.float32)
    tap = shadowed(watched)
    x = torch.randn(3, 4, 16)

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(model, parameters, (x,)).square().mean()
            return out

        parameters = dict(model.named_parameters())
        found: dict[str, Tensor] = torch.func.grad(loss)(parameters, x)
        assert words(tap)[:, 0].tolist() == [int(model is watched)] * 12
        each: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return found | {f"{name} of each": gradient for name, gradient in each.items()}

    expected, got = gradients(plain, x), gradients(watched, x)

    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert words(tap)[:, 0].tolist() == [1] * 12


def test_formats_and_layers_can_be_chosen(collector: FakeCollector) -> None:
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "head": nn.Linear(16, 4)})
    imagined = fp8scope.Shadow(
        AmaxScaling.paper_fig1(), formats=GRAPHCORE, module_filter_fn=lambda module, name: name != "head"
    )

    fp8scope.attach(model, run="run", collector=collector.address, shadow=imagined).close()

    slots = collector.source.open.slots
    assert [(slot.layer, slot.format, slot.margin) for slot in slots] == [
        ("body", "E4M3FNUZ", 3),
        ("body", "E4M3FNUZ", 3),
        ("body", "E5M2FNUZ", 3),
    ]
    assert slots[0].recipe == repr(AmaxScaling.paper_fig1())


def test_fp8_layers_stay_what_they_are_beside_shadowed_ones() -> None:
    model = fp8core.convert_to_fp8(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)),
        recipe=CurrentScaling(),
        module_filter_fn=lambda module, name: name == "0",
    )

    tap = shadowed(model)

    assert [slot.module_class for slot in tap.slots[::3]] == ["Fp8Linear", "Linear"]
    assert [slot.recipe for slot in tap.slots[::3]] == [repr(CurrentScaling()), repr(AmaxScaling())]


@pytest.mark.parametrize("checkpointed", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_model_counts_once(checkpointed: bool) -> None:
    plain, model = build(), build(checkpointed=checkpointed)
    taps = shadowed(plain), shadowed(model)

    gradients = [step(plain, 2), step(model, 2)]

    assert words(taps[0])[:, 0].tolist() == [2, 1, 2] * 4
    assert torch.equal(words(taps[0]), words(taps[1]))
    assert all(map(torch.equal, *gradients))


@pytest.fixture
def graph_breaks() -> Iterator[Callable[[], int]]:
    """How often Dynamo has broken a graph in this test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(emulate_precision_casts=True):
        yield lambda: sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.parametrize("recipe", [AmaxScaling(), DelayedScaling(history_len=3)], ids=repr)
@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "by block"])
@pytest.mark.parametrize("checkpointed", [None, False], ids=["plain", "checkpointed"])
def test_a_compiled_model_has_the_statistics_of_an_eager_one(
    recipe: Recipe, by_block: bool, checkpointed: bool | None, graph_breaks: Callable[[], int]
) -> None:
    blocks = 10 if by_block else 2  # more than the graphs that Dynamo would compile of one function
    eager, compiled = build(blocks=blocks), build(blocks=blocks, checkpointed=checkpointed)
    taps = shadowed(eager, recipe), shadowed(compiled, recipe)
    for part in compiled if by_block else [compiled]:
        part.compile(fullgraph=True, backend="aot_eager")

    gradients = [step(eager, 2), step(compiled, 2)]

    assert graph_breaks() == 0
    assert words(taps[0])[:, 0].tolist() == [2, 1, 2] * 2 * blocks
    assert torch.equal(words(taps[0]), words(taps[1]))
    assert all(map(torch.equal, *gradients))


def test_inductor_leaves_the_same_statistics_where_it_rounds_as_eager_does(graph_breaks: Callable[[], int]) -> None:
    eager, compiled = build(), build()
    taps = shadowed(eager), shadowed(compiled)
    compiled.compile(fullgraph=True)

    step(eager)
    step(compiled)

    assert graph_breaks() == 0
    assert torch.equal(words(taps[0])[:, :INTEGERS_AND_SCALES], words(taps[1])[:, :INTEGERS_AND_SCALES])


def test_copies_are_of_the_class_before_and_record_nothing() -> None:
    model = build()
    tap = shadowed(model)

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in copies:
        step(each)

    assert all(type(each[0].fc1) is nn.Linear for each in copies)
    assert words(tap)[:, 0].tolist() == [0] * 12
    step(model)
    assert words(tap)[:, 0].tolist() == [1] * 12


def test_state_dict_and_buffers_are_what_they_were() -> None:
    model, alone = build(), build()
    shadowed(model, DelayedScaling())

    assert list(model.state_dict()) == list(alone.state_dict())
    assert list(model.buffers()) == []


def test_the_first_monitor_leaves_the_layers_to_the_second(collector: FakeCollector) -> None:
    model = build()
    first = fp8scope.attach(model, run="first", collector=collector.address, shadow=AmaxScaling())
    second = fp8scope.attach(model, run="second", collector=collector.address, shadow=CurrentScaling())
    first.close()

    train(model, 3, second)
    second.close()

    rows = {source.open.run: len(source.rows) for source in collector.sources.values()}
    assert rows == {"first": 0, "second": 3 * 12}
    assert type(model[0].fc1) is nn.Linear


def test_a_class_that_somebody_has_changed_since_is_left_alone() -> None:
    layer = nn.Linear(16, 16)
    tap = shadowed(layer)
    wrapped = type("Wrapped", (type(layer),), {})  # as fully_shard does
    layer.__class__ = wrapped

    tap.release()

    assert type(layer) is wrapped
    layer(torch.randn(4, 16)).sum().backward()
    assert words(tap)[:, 0].tolist() == [0, 0, 0]


class LoRALinear(nn.Module):
    """A frozen layer and two small ones that learn the difference, as peft wraps them."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


def test_layers_wrapped_by_lora_are_recorded_each_by_its_own_name() -> None:
    model = nn.Sequential(LoRALinear(nn.Linear(16, 16), 4), LoRALinear(nn.Linear(16, 16), 4))
    tap = shadowed(model)

    model(torch.randn(8, 16)).sum().backward()

    counts = dict(zip([(slot.layer, str(slot.role)) for slot in tap.slots], words(tap)[:, 0].tolist(), strict=True))
    assert {layer for layer, _ in counts} == {
        f"{i}.{part}" for i in "01" for part in ("base_layer", "lora_A", "lora_B")
    }
    # The first base layer has no gradient to compute at all, so there is no grad_output either.
    assert [key for key, count in counts.items() if count != 1] == [("0.base_layer", "grad_output")]


def test_tied_shared_and_repeated_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.tied = nn.Linear(16, 16)
            self.tied.weight = self.first.weight
            self.alias = self.first
            self.never = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.tied(self.alias(self.first(x)))
            return out

    model = Net()
    tap = shadowed(model)

    model(torch.randn(8, 16)).sum().backward()

    assert [slot.layer for slot in tap.slots[::3]] == ["first", "tied", "never"]
    assert words(tap)[:, 0].tolist() == [2, 1, 2, 1, 1, 1, 0, 0, 0]
    numel = words(tap)[:, COLUMNS.index("numel")].tolist()
    assert numel[:3] == [2 * 8 * 16, 16 * 16, 2 * 8 * 16]
    amax = words(tap)[:, COLUMNS.index("amax")].view(torch.float64)
    assert amax[1] == amax[4] == model.first.weight.abs().max()


def test_a_parametrized_weight_is_computed_once_a_forward() -> None:
    def build() -> nn.Linear:
        torch.manual_seed(0)
        layer: nn.Linear = parametrizations.spectral_norm(nn.Linear(16, 16))  # each access moves its power iteration
        return layer

    alone, watched = build(), build()
    tap = shadowed(watched)
    x = torch.randn(8, 16)

    assert torch.equal(alone(x), watched(x))
    assert torch.equal(alone(x), watched(x))
    assert words(tap)[:2, 0].tolist() == [2, 1]
    assert words(tap)[1, COLUMNS.index("amax")].view(torch.float64) < alone.parametrizations.weight.original.abs().max()
    tap.release()
    assert type(watched).__name__ == "ParametrizedLinear"


def test_a_layer_with_a_forward_of_its_own_is_no_plain_layer() -> None:
    hooked = nn.Linear(16, 16)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(hooked, nn.Linear(16, 16), nn.Linear(16, 16).double(), nn.Bilinear(4, 4, 4))

    assert [slot.layer for slot in shadowed(model).slots[::3]] == ["1"]


def test_what_cannot_be_observed_is_no_error() -> None:
    layer = nn.Linear(16, 16)
    tap = shadowed(layer)
    layer.double()

    layer(torch.randn(4, 16).double()).sum().backward()
    layer.float()
    layer(torch.randn(0, 16)).sum().backward()
    layer.eval()
    layer(torch.randn(4, 16)).sum().backward()

    assert words(tap)[[0, 2], 0].tolist() == [0, 0]


def test_under_autocast_the_tensors_are_taken_as_they_come_in() -> None:
    layer, x = nn.Linear(16, 16), torch.randn(8, 16)
    alone = copy.deepcopy(layer)
    tap = shadowed(layer)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), alone(x)
    y.sum().backward()

    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert np.isclose(words(tap)[0, COLUMNS.index("amax")].view(torch.float64).item(), x.abs().max().item(), rtol=0)
