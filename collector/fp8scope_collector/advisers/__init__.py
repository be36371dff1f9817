"""What a recorded run says about recipes it did not use: constants that would work, and how stale a scale may be."""

from fp8scope_collector.advisers.constant_scale import ConstantAdvice, advise_constant
from fp8scope_collector.advisers.history import TensorHistory, histories
from fp8scope_collector.advisers.refresh import RefreshAdvice, advise_refresh

__all__ = ["ConstantAdvice", "RefreshAdvice", "TensorHistory", "advise_constant", "advise_refresh", "histories"]
