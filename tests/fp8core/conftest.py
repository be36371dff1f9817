"""What the numerics tests share: one torch thread, the formats, the kernels of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F

from fp8core.kernels import dispatch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def eager_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every cast by the eager kernels."""
    monkeypatch.setenv(dispatch.ENV, "eager")
    dispatch.kernels_for.cache_clear()
    yield
    dispatch.kernels_for.cache_clear()


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(self.norm1(x_BTD)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).reshape(B, T, D))
        out: torch.Tensor = x_BTD + self.fc2(F.gelu(self.fc1(self.norm2(x_BTD))))
        return out


class Gpt(nn.Module):
    """A GPT of two blocks, 32 wide, over 64 symbols."""

    def __init__(self, vocabulary: int = 64, d: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList([Block(d, heads=2) for _ in range(blocks)])
        self.head = nn.Linear(d, vocabulary)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: torch.Tensor = self.head(x_BTD)
        return logits


@pytest.fixture
def gpt() -> Callable[[], nn.Module]:
    """Makes the same small GPT at every call."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Gpt()

    return make
