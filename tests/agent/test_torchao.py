"""torchao's Float8Linear: the scales that we report are those that it used, and it computes what it did without us."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8 import float8_linear as torchao_linear

import fp8scope_agent as fp8scope
from fake_collector import FakeCollector
from fp8core import CurrentScaling
from fp8core.records import COLUMNS
from fp8scope_agent.adapters import native, torchao
from fp8scope_agent.adapters.tap import Tap, bind
from fp8scope_agent.ring import DEPTH

STEPS = DEPTH  # as many as the ring holds: none is dropped on a busy machine
INTEGERS_AND_SCALES = COLUMNS.index("sum_sq")


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.act = nn.ReLU(inplace=True)  # of a layer without bias torchao itself forbids it
        self.fc2 = nn.Linear(32, 16, bias=False)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self._run, x, use_reentrant=False) if self.checkpointed else self._run(x)
        return out

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(x)))
        return out


def build(blocks: int = 2, *, checkpointed: bool = False, config: Float8LinearConfig | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(checkpointed) for _ in range(blocks))).bfloat16()
    converted: nn.Sequential = convert_to_float8_training(model, config=config or Float8LinearConfig(emulate=True))
    return converted


def watched(model: nn.Module) -> Tap:
    return bind(model, [native.find, torchao.find])


def words(tap: Tap) -> Tensor:
    (arena,) = tap.arenas
    return arena.words


def step(model: nn.Module, seed: int = 1) -> list[Tensor]:
    """Forward and backward: the gradients."""
    model.zero_grad()
    x = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture
def used_scales(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The scales of torchao's own casts, by role, in the order of the casts."""
    seen: dict[str, list[float]] = defaultdict(list)
    cast = torchao_linear.hp_tensor_to_float8_dynamic

    def spy(*arguments: object, **settings: object) -> object:
        q = cast(*arguments, **settings)
        seen[settings["gemm_input_role"].value].append(q._scale.item())  # type: ignore[attr-defined]
        return q

    monkeypatch.setattr(torchao_linear, "hp_tensor_to_float8_dynamic", spy)
    return seen


@pytest.mark.parametrize("power_of_two", [False, True])
def test_torchaos_own_scales_are_the_ones_that_are_reported(
    power_of_two: bool, used_scales: dict[str, list[float]], collector: FakeCollector
) -> None:
    model = build(config=Float8LinearConfig(emulate=True, round_scales_to_power_of_2=power_of_two))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    used = []

    with fp8scope.attach(model, run="run", collector=collector.address) as monitor:
        for number in range(STEPS):
            used_scales.clear()
            step(model, seed=number)
            optimizer.step()
            monitor.step()
            # Each tensor is cast twice; the backward goes through the layers in reverse.
            used.append(
                [
                    [
                        used_scales[role][:4][layer] if role != "grad_output" else used_scales[role][::2][3 - layer]
                        for role in ("input", "weight", "grad_output")
                    ]
                    for layer in range(4)
                ]
            )

    reported = [
        [[collector.source.rows[number, 3 * layer + role]["scale_max"] for role in range(3)] for layer in range(4)]
        for number in range(STEPS)
    ]
    assert reported == used
    slots = collector.source.open.slots
    assert {slot.module_class for slot in slots} == {"Float8Linear"}
    assert {slot.recipe for slot in slots} == {repr(CurrentScaling(power_of_two=power_of_two))}
    assert [slot.format for slot in slots[:3]] == ["E4M3FN", "E4M3FN", "E5M2"]
    assert all(row["overflow"] == 0 and row["sum_sq"] > 0 for row in collector.source.rows.values())
    assert type(model[0].fc1) is torchao_linear.Float8Linear
    assert collector.source.open.environment["torchao"] == metadata.version("torchao")


@pytest.mark.parametrize("value", [0.0, 1e-20, float("inf"), float("nan")])
def test_torchaos_scales_at_the_edges_are_reported_as_they_are(
    value: float, used_scales: dict[str, list[float]]
) -> None:
    layer = build()[0].fc1
    tap = watched(layer)
    x = torch.full((4, 16), value, dtype=torch.bfloat16)

    layer(x)

    scale = words(tap)[0, COLUMNS.index("scale_max")].view(torch.float64).item()
    assert scale == (0.0 if value != value else used_scales["input"][0])  # NaN is reported as 0: nothing is left
    assert words(tap)[0, COLUMNS.index("nonfinite")] == (0 if abs(value) < 1 else x.numel())


def test_gradients_are_those_of_the_model_that_nobody_watches() -> None:
    alone, model = build(), build()
    watched(model)

    assert all(map(torch.equal, step(alone), step(model)))


def test_nothing_more_is_kept_for_the_backward() -> None:
    def kept(model: nn.Module) -> list[tuple[torch.Size, torch.dtype]]:
        seen = []

        def pack(tensor: Tensor) -> Tensor:
            seen.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step(model)
        return seen

    alone, model = build(), build()
    watched(model)

    assert kept(model) == kept(alone)


def test_a_checkpointed_model_counts_once() -> None:
    plain, model = build(), build(checkpointed=True)
    taps = watched(plain), watched(model)

    gradients = [step(plain), step(model)]

    assert words(taps[1])[:, 0].tolist() == [1] * 12
    assert torch.equal(words(taps[0]), words(taps[1]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "by block"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_has_the_statistics_of_an_eager_one(backend: str, by_block: bool) -> None:
    blocks = 10 if by_block and backend == "aot_eager" else 2
    eager, alone, compiled = build(blocks), build(blocks), build(blocks)
    taps = watched(eager), watched(compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    with torch._inductor.config.patch(emulate_precision_casts=True):
        for model in (alone, compiled):
            for part in model if by_block else [model]:
                part.compile(fullgraph=True, backend=backend)
        step(eager)
        gradients = [step(alone), step(compiled)]

    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert all(map(torch.equal, *gradients))
    assert words(taps[1])[:, 0].tolist() == [1] * 6 * blocks
    assert torch.equal(words(taps[0])[:, :INTEGERS_AND_SCALES], words(taps[1])[:, :INTEGERS_AND_SCALES])


def test_a_copy_is_a_float8_layer_and_records_nothing() -> None:
    model = build()
    tap = watched(model)

    twin = copy.deepcopy(model)
    step(twin)

    assert type(twin[0].fc1) is torchao_linear.Float8Linear
    assert words(tap)[:, 0].tolist() == [0] * 12


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Float8LinearConfig.from_recipe_name("rowwise"), "as a whole"),
        (Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), "as a whole"),
        (Float8LinearConfig(enable_fsdp_float8_all_gather=True), "enable_fsdp_float8_all_gather"),
    ],
    ids=["rowwise", "not all", "all-gather"],
)
def test_layers_that_are_scaled_otherwise_are_left_alone_and_named(
    config: Float8LinearConfig, reason: str, collector: FakeCollector, warnings_of: Callable[[], list[str]]
) -> None:
    model = build(config=config)

    fp8scope.attach(model, run="run", collector=collector.address).close()

    assert [sentence for sentence in warnings_of() if "'0.fc1' is the first" in sentence and reason in sentence]
    assert type(model[0].fc1) is torchao_linear.Float8Linear
