"""quantize_for_inference holds weights in FP8 and gives what Fp8Linear gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fp8core import (
    E4M3FNUZ,
    AmaxScaling,
    ConstantScaling,
    CurrentScaling,
    DelayedScaling,
    convert_to_fp8,
    quantize_for_inference,
)
from fp8core.inference import Fp8InferenceLinear
from fp8core.recipes import Recipe


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False)).bfloat16()


@pytest.mark.parametrize("recipe", [AmaxScaling(), CurrentScaling(), ConstantScaling(4)], ids=repr)
def test_output_equals_that_of_fp8_layers_bit_for_bit(recipe: Recipe) -> None:
    x = torch.randn(2, 5, 32).bfloat16()

    served = quantize_for_inference(model(), recipe)

    assert torch.equal(served(x), convert_to_fp8(model(), recipe=recipe).eval()(x))


def test_a_model_trained_in_fp8_serves_the_same_outputs() -> None:
    trained = convert_to_fp8(model())
    x = torch.randn(4, 32).bfloat16()
    expected = trained(x)

    assert torch.equal(quantize_for_inference(trained)(x), expected)


def test_weights_take_one_byte_an_element_and_travel_so() -> None:
    served = quantize_for_inference(model(), fmt=E4M3FNUZ)

    state = served.state_dict()

    assert list(state) == ["0.weight", "0.weight_scale", "0.bias", "2.weight", "2.weight_scale"]
    assert state["0.weight"].dtype == torch.float8_e4m3fnuz
    assert not list(served.parameters())
    weights = [module.weight for module in model() if isinstance(module, nn.Linear)]  # bfloat16
    served_bytes = sum(each.nbytes for each in (state["0.weight"], state["2.weight"]))
    assert served_bytes * 2 == sum(weight.nbytes for weight in weights)
    other = quantize_for_inference(
        nn.Sequential(*[nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16, bias=False)]).bfloat16(), fmt=E4M3FNUZ
    )
    other.load_state_dict(state)
    x = torch.randn(4, 32).bfloat16()
    assert torch.equal(other(x), served(x))


def test_filter_lone_layer_and_printing() -> None:
    served = quantize_for_inference(model(), module_filter_fn=lambda module, name: name != "2")
    alone = quantize_for_inference(nn.Linear(4, 4))

    assert type(served[2]) is nn.Linear
    assert isinstance(alone, Fp8InferenceLinear)
    assert "in_features=4, out_features=4, bias=True, recipe=AmaxScaling(" in repr(alone)
    assert repr(alone).endswith("weight 16 bytes (bfloat16: 32))")


def test_tied_embedding_stays_in_high_precision() -> None:
    embed, head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    head.weight = embed.weight

    quantize_for_inference(nn.ModuleDict({"embed": embed, "head": head}))

    assert embed.weight.dtype == torch.float32


def test_delayed_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a training history; choose"):
        quantize_for_inference(model(), DelayedScaling())


def test_it_compiles_in_one_graph() -> None:
    served = quantize_for_inference(model())
    x = torch.randn(4, 32).bfloat16()

    compiled = torch.compile(served, backend="aot_eager", fullgraph=True)

    assert torch.equal(compiled(x), served(x))


def test_wrong_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 32 features"):
        quantize_for_inference(model())(torch.randn(4, 31))


def test_a_change_of_dtype_leaves_the_codes_alone() -> None:
    served = quantize_for_inference(model(), CurrentScaling())
    before = served.state_dict()["0.weight"].clone()
    scale = served.state_dict()["0.weight_scale"].clone()

    served.float()

    assert torch.equal(served.state_dict()["0.weight"].view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(served.state_dict()["0.weight_scale"], scale)
    assert served(torch.randn(4, 32)).dtype == torch.float32
