"""A stand-in for Transformer Engine's LogFp8TensorStats: its metrics' names and definitions, without its layers."""

from __future__ import annotations

from typing import Any

import torch
from nvdlfw_inspect.debug_features.generic_feature_api import GenericConfigAPIMapper, GenericFrameworkAPI
from nvdlfw_inspect.logging import MetricLogger
from nvdlfw_inspect.registry import Registry, api_method


@Registry.register_namespace_api(namespace="transformer_engine")
class TransformerEngineApi(GenericFrameworkAPI):  # type: ignore[misc]
    """Routes calls as the base namespace does."""


@Registry.register_feature(namespace="transformer_engine")
class LogFp8TensorStats(GenericConfigAPIMapper):  # type: ignore[misc]
    """Logs what a cast to E4M3 by current scaling does to a tensor."""

    @api_method
    def log_fp8_tensor_stats(self, config: dict[str, Any], layer_name: str, **kwargs: Any) -> dict[str, Any]:
        x = kwargs["tensor"].detach().float()
        scale_inv = x.abs().amax() / 448.0
        q = (x / scale_inv).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        values = {
            "underflows%": 100.0 * (x.count_nonzero() - q.count_nonzero()) / x.numel(),
            "scale_inv_min": scale_inv,
            "scale_inv_max": scale_inv,
            "mse": (q * scale_inv - x).square().mean(),
        }
        for stat in config["stats"]:
            MetricLogger.log_scalar(f"{layer_name}_{kwargs['tensor_name']}_{stat}", values[stat], kwargs["iteration"])
        return {}
