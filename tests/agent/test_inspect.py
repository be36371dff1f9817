"""What Transformer Engine's debug features log through nvdlfw-inspect arrives, under our names where we have one.

The library is real, its base feature is; Transformer Engine's own is a stand-in with its names (no GPU, so no TE here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nvdlfw_inspect.api as debug_api
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fp8scope_agent as fp8scope
from fake_collector import FakeCollector
from fp8scope_agent.adapters.inspect import MAX_WAITING, InspectLogger
from fp8scope_agent.named import Named, split

FEATURES = Path(__file__).parents[1] / "support" / "inspect_features"
CONFIG = """
all:
  enabled: True
  layers:
    layer_types: [fc]
  LogTensorStats:
    enabled: True
    tensors: [activation, weight, gradient, output]
    stats: [min, max, mean, l2_norm]
    freq: 1
  transformer_engine:
    LogFp8TensorStats:
      enabled: True
      tensors: [activation, weight, gradient]
      stats: ["underflows%", scale_inv_min, scale_inv_max, mse]
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(16, 32)
        self.fc_weight_2 = nn.Linear(32, 16)  # a name that could be taken for a tensor's

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc_weight_2(self.fc_1(x).relu())
        return out


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[InspectLogger]:
    config = tmp_path / "debug.yaml"
    config.write_text(CONFIG)
    logger = InspectLogger()
    debug_api.initialize(
        config_file=str(config), feature_dirs=[str(FEATURES)], statistics_logger=logger, log_dir=str(tmp_path)
    )
    yield logger
    debug_api.end_debug()


@pytest.fixture
def net(logger: InspectLogger) -> Net:
    torch.manual_seed(0)
    net = Net()
    debug_api.infer_and_assign_layer_names(net)
    return net


def observe(net: Net, iteration: int) -> dict[tuple[str, str], Tensor]:
    """A step in which each layer calls the debug features as Transformer Engine's do; the tensors of it."""
    seen: dict[tuple[str, str], Tensor] = {}

    def call(layer: str, tensor_name: str, tensor: Tensor) -> None:
        seen[layer, tensor_name] = tensor.detach()
        arguments = {"tensor_name": tensor_name, "tensor": tensor.detach(), "iteration": iteration}
        debug_api.log_tensor_stats(layer, skip_reduction=True, **arguments)
        if tensor_name != "output":
            debug_api.transformer_engine.log_fp8_tensor_stats(layer, **arguments)

    x = torch.randn(8, 16)
    for layer in (net.fc_1, net.fc_weight_2):
        name: str = layer.name  # type: ignore[assignment]  # set by infer_and_assign_layer_names
        y = layer(x)
        y.register_hook(lambda dy, name=name: call(name, "gradient", dy))
        for tensor_name, tensor in (("activation", x), ("weight", layer.weight), ("output", y)):
            call(name, tensor_name, tensor)
        x = y.relu()
    x.square().sum().backward()
    return seen


def test_statistics_arrive_under_our_names_where_we_have_one_and_else_under_theirs(
    logger: InspectLogger, net: Net, collector: FakeCollector
) -> None:
    tensors = []
    with fp8scope.attach(net, run="te", collector=collector.address, inspect=logger) as monitor:
        for step in range(3):
            tensors.append(observe(net, step))
            debug_api.step()
            monitor.step(loss=1.0)

    source = collector.source
    slots = [(slot.layer, slot.role, slot.module_class, slot.in_features) for slot in source.open.slots]
    assert slots[::3] == [("model.fc_1", 1, "Linear", 16), ("model.fc_weight_2", 1, "Linear", 32)]
    assert set(source.rows) == {(step, slot) for step in range(3) for slot in range(6)}
    assert source.duplicate_rows == 0
    names = {"min", "max", "mean", "l2_norm", "underflows%", "mse"}
    of_output = {f"output_{name}" for name in ("min", "max", "mean", "l2_norm")}
    assert {name for name, _, slot in source.extras if slot != 2 and slot != 5} == names
    assert {name for name, _, slot in source.extras if slot == 2} == names | of_output
    for step, seen in enumerate(tensors):
        for slot, tensor_name in enumerate(("activation", "weight", "gradient")):
            x = seen["model.fc_1", tensor_name]
            row = source.rows[step, slot]
            assert row["amax"] == x.abs().max().item()
            assert row["scale_min"] == row["scale_max"] == pytest.approx(448 / x.abs().max().item(), rel=1e-6)
            assert source.extras["mean", step, slot] == pytest.approx(x.mean().item())
            assert source.extras["l2_norm", step, slot] == pytest.approx(x.norm().item())
        assert source.extras["output_max", step, 2] == seen["model.fc_1", "output"].max().item()


def test_logging_a_scalar_does_not_wait_for_the_device(net: Net, logger: InspectLogger) -> None:
    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a value was asked for"
            return func(*args, **(kwargs or {}))

    monitor = fp8scope.attach(net, run="te", collector="127.0.0.1:1", inspect=logger)
    value = torch.tensor(2.0)

    with NoSync():
        logger.log_scalar("model.fc_1_activation_mean", value, 0)
        logger.log_scalar("model.fc_1_activation_max", torch.empty((), device="meta"), 0)

    assert logger.take()[0].value is value
    monitor.close(timeout_s=0)


def test_what_is_logged_after_the_step_keeps_the_number_of_its_iteration(
    net: Net, logger: InspectLogger, collector: FakeCollector
) -> None:
    with fp8scope.attach(net, run="te", collector=collector.address, inspect=logger) as monitor:
        for step in range(2):
            monitor.step()
            logger.log_scalar("model.fc_1_weight_mean", torch.tensor(float(step)), step)

    assert collector.source.extras == {("mean", 0, 1): 0.0, ("mean", 1, 1): 1.0}


def test_a_name_of_no_layer_is_said_once_and_costs_nothing(
    net: Net, logger: InspectLogger, collector: FakeCollector, warnings_of: Callable[[], list[str]]
) -> None:
    with fp8scope.attach(net, run="te", collector=collector.address, inspect=logger, exclude=["*weight_2"]) as monitor:
        for name in ("model.other_activation_max", "model.fc_weight_2_weight_max", "loss", "model.fc_1_activation_max"):
            logger.log_scalar(name, 1.0, 0)
        monitor.step()

    assert list(collector.source.extras) == [("max", 0, 0)]
    assert len([sentence for sentence in warnings_of() if "'model.other_activation_max'" in sentence]) == 1


def test_values_that_no_step_fetches_are_bounded_and_counted(
    net: Net, logger: InspectLogger, collector: FakeCollector
) -> None:
    monitor = fp8scope.attach(net, run="te", collector=collector.address, inspect=logger)
    for iteration in range(MAX_WAITING + 5):
        logger.log_scalar("model.fc_1_activation_mean", 1.0, iteration)

    assert monitor.snapshot().rows_dropped == {"inspect_full": 5}
    assert logger.take()[0].step == 5
    monitor.close()
    logger.log_scalar("model.fc_1_activation_mean", 1.0, 0)
    assert logger.take() == []


def test_scales_of_recipes_that_have_one_a_tensor_become_fields_and_those_of_blocks_do_not() -> None:
    values = [
        Named(0, 0, "cur_amax", 2.0),
        Named(0, 0, "min", -3.0),
        Named(0, 0, "max", 1.0),
        Named(0, 0, "fp8_current_scaling_scale_inv_max", 0.5),
        Named(0, 0, "fp8_current_scaling_scale_inv_min", 0.25),
        Named(0, 1, "min", -3.0),
        Named(0, 1, "max", 1.0),
        Named(1, 1, "max", 1.0),
        Named(0, 2, "mxfp8_scale_inv_max", 0.5),
        Named(0, 2, "scale_inv_max_columnwise", 0.5),
        Named(0, 3, "scale_inv_max", 0.0),
    ]

    groups, others = split(values)

    rows = {
        (step, int(slot)): {name: float(column[index]) for name, column in rows.columns.items()}
        for step, rows in groups
        for index, slot in enumerate(rows.slot)
    }
    assert rows == {
        (0, 0): {"amax": 2.0, "scale_min": 2.0, "scale_max": 4.0},
        (0, 1): {"amax": 3.0},
        (0, 3): {"scale_min": float("inf")},
    }
    assert [named.name for named in others if named.slot == 2] == ["mxfp8_scale_inv_max", "scale_inv_max_columnwise"]
    assert len(others) == 7
