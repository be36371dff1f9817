"""CurrentScaling casts what torchao casts to the same bits: every tensor of 20 training steps of a torchao model.

Teacher-forced: torchao trains, and each tensor that it casts is given to us as well. Trained side by side the two would
drift apart, since their emulated GEMMs round differently.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fp8core import CurrentScaling, device_scaling
from fp8core.formats import FORMATS
from fp8core.quantize import quantize

float8_linear = pytest.importorskip("torchao.float8.float8_linear", reason="torchao is not installed")

FORMAT_BY_DTYPE = {getattr(torch, fmt.torch_dtype): fmt for fmt in FORMATS.values()}


@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_tensor_that_torchao_casts_gets_the_same_scale_and_payload(
    power_of_two: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    roles, differing = [], []
    by_torchao = float8_linear.hp_tensor_to_float8_dynamic

    def compare(x: torch.Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        theirs = by_torchao(x, dtype, *args, **kwargs)
        q, scale = quantize(x, recipe=CurrentScaling(power_of_two), role="input", fmt=FORMAT_BY_DTYPE[dtype])
        roles.append(kwargs["gemm_input_role"].value)
        if scale != theirs._scale or not torch.equal(q.view(torch.uint8), theirs._data.contiguous().view(torch.uint8)):
            differing.append((roles[-1], scale.item(), theirs._scale.item()))
        return theirs

    monkeypatch.setattr(float8_linear, "hp_tensor_to_float8_dynamic", compare)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
    config = Float8LinearConfig(emulate=True, round_scales_to_power_of_2=power_of_two)
    convert_to_float8_training(model, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        x = torch.randn(16, 32).bfloat16()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert len(roles) >= 20 * 2 * 5
    assert set(roles) == {"input", "weight", "grad_output"}
    assert not differing


def test_scales_equal_torchaos_for_a_million_amaxes() -> None:
    from torchao.float8.float8_utils import amax_to_scale

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(1, 0x7F800000, (1_000_000,), generator=generator, dtype=torch.int32)
    amax = bits.view(torch.float32)
    amax = amax[amax >= 1e-12]

    for dtype, fmt in FORMAT_BY_DTYPE.items():
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            assert torch.equal(device_scaling.current_scale(amax, fmt), amax_to_scale(amax, dtype)), fmt
