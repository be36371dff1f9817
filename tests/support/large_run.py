"""A run as large as real ones: 560 layers x 3 roles, several ranks, written through the collector's writer.

Its tensors behave: a scale follows its tensor, a drift differs by role, and one weight overflows after step 9,000 (in a
shorter run after `broken_from`). bench/dashboard.py and the browser tests look at it.
"""

from __future__ import annotations

import time
import uuid

import numpy as np

from fp8core.records import Role
from fp8scope_collector.messages import Batch, Catalogue, Opening, SlotSpec, Source
from fp8scope_collector.storage.engine import migrate, open_engine
from fp8scope_collector.storage.reader import Reader
from fp8scope_collector.storage.writer import StatsWriter

BLOCKS = 140
LEAVES = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
LAYERS = [f"blocks.{block}.{leaf}" for block in range(BLOCKS) for leaf in LEAVES]
BROKEN = 700  # the slot that overflows: weight of blocks.58.attn.out
STEPS_A_BATCH = 8


class Recording:
    """A run that is written in steps, with rows like those of a training: a scale that follows its tensor."""

    def __init__(self, url: str, name: str, ranks: int, *, broken_from: int = 9001) -> None:
        self.broken_from = broken_from
        engine = open_engine(url)
        migrate(engine)
        self.writer = StatsWriter(engine)
        while self.writer.catch_up(now_unix_ns=time.time_ns()):
            pass
        known = {run.name: run for run in Reader(url).runs()}
        self.next_step = 0 if name not in known else (known[name].last_step or -1) + 1
        self.sources = [
            self.writer.register(opening(name, rank, ranks), now_unix_ns=time.time_ns()) for rank in range(ranks)
        ]
        self.seq = max(source.up_to_seq for source in self.sources) + 1
        self.rng = np.random.default_rng(self.next_step)

    def grow(self, steps: int) -> None:
        """Commits further steps of all ranks, some steps a batch."""
        for start in range(self.next_step, self.next_step + steps, STEPS_A_BATCH):
            count = min(STEPS_A_BATCH, self.next_step + steps - start)
            group = [self._batch(source, rank, start, count) for rank, source in enumerate(self.sources)]
            self.writer.commit(group, now_unix_ns=time.time_ns())
            self.seq += 1
        self.next_step += steps

    def _batch(self, source: Source, rank: int, start: int, count: int) -> Batch:
        slots = 3 * len(LAYERS)
        step = np.repeat(np.arange(start, start + count), slots)
        slot = np.tile(np.arange(slots), count)
        role = slot % 3
        drift = np.sin(step / 900 + slot / 40) * np.array([1, 0.3, 3])[role]
        exponent = np.array([2.0, -3.0, -18.0])[role] + drift + self.rng.normal(0, 0.25, step.size)
        amax = np.exp2(exponent)
        largest = np.where(role == 2, 57344.0, 448.0)
        scale = np.exp2(np.floor(np.log2(largest / amax)) - np.where(role == 2, 3, 0))
        numel = np.full(step.size, 2**20)
        broken = (slot == BROKEN) & (step >= self.broken_from)
        sum_sq = amax**2 * 2**17
        columns = {
            "amax": amax.astype(np.float32),
            "scale_min": scale.astype(np.float32),
            "scale_max": scale.astype(np.float32),
            "numel": numel,
            "zeros": np.zeros(step.size, np.int64),
            "overflow": np.where(broken, 4000, 0),
            "underflow": self.rng.poisson(40, step.size),
            "subnormal": self.rng.poisson(900, step.size),
            "nonfinite": np.zeros(step.size, np.int64),
            "sum_sq": sum_sq,
            "err_sq": sum_sq * 10 ** -np.where(role == 2, 2.55, 3.15),
        }
        loss = [(s, "loss", 2 + 8 / (1 + s / 300)) for s in range(start, start + count)] if rank == 0 else []
        return Batch(source, self.seq, 0, step, slot, columns, tuple(loss))


def opening(name: str, rank: int, ranks: int) -> Opening:
    slots = tuple(
        SlotSpec(
            layer=layer,
            role=role,
            module_class="Fp8Linear",
            in_features=4096,
            out_features=4096,
            format="E5M2" if role == Role.GRAD_OUTPUT else "E4M3FN",
            recipe="AmaxScaling()",
            margin=3 if role == Role.GRAD_OUTPUT else 0,
        )
        for layer in LAYERS
        for role in Role
    )
    return Opening(
        project="",
        run=name,
        rank=rank,
        world_size=ranks,
        incarnation=1,
        source_uuid=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{rank}")),
        started_unix_ns=time.time_ns(),
        sent_unix_ns=time.time_ns(),
        agent_version="0.1.0",
        catalogue=Catalogue(slots, b"large"),
        config_json='{"lr": 0.001}',
        environment_json='{"host": "bench"}',
        tags_json="[]",
        notes="",
    )
