"""Training loops of others, with our callback, to a real collector: what is in its database afterwards."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import sqlalchemy as sa
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fp8core
import fp8scope_agent as fp8scope
from fp8core import AmaxScaling
from fp8scope_agent.callbacks import huggingface
from fp8scope_agent.callbacks import lightning as lightning_callbacks
from programs import Program

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Database:
    """The collector's, and how to ask it."""

    def __init__(self, url: str, address: str) -> None:
        self.address = address
        self._engine = sa.create_engine(url)

    def ask(self, query: str) -> list[Any]:
        with self._engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def close(self) -> None:
        self._engine.dispose()


@pytest.fixture
def database(
    tmp_path: Path, start_collector: Callable[..., tuple[Program, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    monkeypatch.setenv("FP8SCOPE_SPOOL_DIR", str(tmp_path / "spool"))
    torch.set_num_threads(1)
    url = f"sqlite:///{tmp_path / 'fp8scope.db'}"
    database = Database(url, start_collector(url)[1])
    yield database
    database.close()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


TOKENS = [
    {"input_ids": tokens, "labels": tokens}
    for tokens in torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))
]


def trainer(folder: Path, model: nn.Module, callbacks: list[TrainerCallback], **arguments: Any) -> Trainer:
    settings = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **arguments,
        }
    )
    return Trainer(model, settings, train_dataset=TOKENS, eval_dataset=TOKENS[:4], callbacks=callbacks)


def test_a_llama_trained_by_the_trainer_leaves_a_row_for_each_layer_role_and_optimizer_step(
    tmp_path: Path, database: Database
) -> None:
    model = fp8core.convert_to_fp8(tiny_llama(), module_filter_fn=lambda module, name: name != "lm_head")
    callback = huggingface.Fp8scopeCallback(run="llama", collector=database.address)

    trainer(tmp_path / "out", model, [callback], eval_strategy="steps", eval_steps=2, hub_token="hunter2").train()

    rows = database.ask("SELECT step, layer, role, numel FROM stats JOIN slot USING (slot) ORDER BY step")
    assert {row[:3] for row in rows} == {
        (step, f"model.layers.{n}.{linear}", role)
        for step in (1, 2, 3, 4)
        for n in (0, 1)
        for linear in LINEARS
        for role in ("input", "weight", "grad_output")
    }
    assert len(rows) == 4 * 2 * 7 * 3
    tokens = 2 * 2 * 16  # of a step: two micro-batches of two sequences; the evaluations between are not in it
    assert {row[3] for row in rows if row[2] == "input" and "mlp.down" in row[1]} == {tokens * 64}
    scalars = {(name, step): value for name, step, value in database.ask("SELECT name, step, value FROM scalar")}
    assert {step for name, step in scalars if name == "loss"} == {1, 2, 3, 4}
    assert {step for name, step in scalars if name == "eval_loss"} == {2, 4}
    assert {"grad_norm", "learning_rate"} < {name for name, _ in scalars}
    assert not any(name.startswith("train_") for name, _ in scalars)
    ((config, outcome),) = database.ask("SELECT config_json, outcome FROM run JOIN source ON run_id = run.id")
    assert json.loads(config)["trainer"]["gradient_accumulation_steps"] == 2
    assert json.loads(config)["model"]["hidden_size"] == 32
    assert "hunter2" not in config
    assert outcome == "finished"


def test_a_resumed_trainer_is_the_next_life_of_its_run_and_shadow_mode_changes_no_loss(
    tmp_path: Path, database: Database
) -> None:
    def losses(folder: str, *callbacks: TrainerCallback, resume: bool = False, **arguments: Any) -> list[float]:
        training = trainer(tmp_path / folder, tiny_llama(), list(callbacks), save_strategy="steps", **arguments)
        training.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-3") if resume else None)
        return [entry["loss"] for entry in training.state.log_history if "loss" in entry]

    def callback() -> huggingface.Fp8scopeCallback:
        return huggingface.Fp8scopeCallback(collector=database.address, shadow=AmaxScaling())

    alone = losses("alone", save_steps=100)
    watched = losses("watched", callback(), save_steps=3)
    losses("watched", callback(), resume=True, save_steps=100)

    assert watched == alone
    lives = database.ask(
        "SELECT incarnation, MIN(step), MAX(step), COUNT(*) FROM stats JOIN source ON source.id = source_id"
        " GROUP BY incarnation ORDER BY incarnation"
    )
    assert lives == [(1, 1, 4, 4 * 45), (2, 4, 4, 45)]  # lm_head, too
    assert database.ask("SELECT DISTINCT name FROM run") == [("watched",)]


class Module(pl.LightningModule):
    def __init__(self, width: int = 16, fail_at: int = -1) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = fp8core.convert_to_fp8(nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == self.hparams["fail_at"]:
            raise RuntimeError("out of luck")
        loss: Tensor = (self.net(batch) - batch).square().mean()
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", (self.net(batch) - batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, module: Module, *callbacks: pl.Callback) -> None:
    data = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)  # about workers of the loaders
        pl.Trainer(
            max_epochs=2,
            accumulate_grad_batches=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=list(callbacks),
        ).fit(module, DataLoader(data, batch_size=8), DataLoader(data[:8], batch_size=8))


def test_a_lightning_module_leaves_a_row_for_each_optimizer_step(tmp_path: Path, database: Database) -> None:
    alone, watched = Module(), Module()
    fit(tmp_path, alone)

    fit(tmp_path, watched, lightning_callbacks.Fp8scopeCallback(run="lightning", collector=database.address))

    assert all(map(torch.equal, alone.parameters(), watched.parameters()))
    rows = database.ask("SELECT step, layer, role, numel FROM stats JOIN slot USING (slot) ORDER BY step")
    assert len(rows) == len({row[:3] for row in rows}) == 4 * 6
    assert {(step, layer) for step, layer, _, _ in rows} == {(n, f"net.{i}") for n in (1, 2, 3, 4) for i in (0, 2)}
    assert {numel for _, layer, role, numel in rows if (layer, role) == ("net.0", "input")} == {3 * 8 * 16}
    scalars = {(name, step): value for name, step, value in database.ask("SELECT name, step, value FROM scalar")}
    assert {step for name, step in scalars if name == "loss"} == {1, 2, 3, 4}
    assert {step for name, step in scalars if name == "val_loss"} == {2, 4}  # not that of the sanity check
    with torch.no_grad():
        first = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))[:24]
        expected = (Module().net(first) - first).square().mean()
    assert scalars["loss", 1] == pytest.approx(expected.item(), rel=0.02)  # FP8 scales differ from one batch to three
    ((config, outcome),) = database.ask("SELECT config_json, outcome FROM run JOIN source ON run_id = run.id")
    assert json.loads(config) == {"width": 16, "fail_at": -1}
    assert outcome == "finished"


def test_a_lightning_run_that_fails_says_why(tmp_path: Path, database: Database) -> None:
    callback = lightning_callbacks.Fp8scopeCallback(run="unlucky", collector=database.address)

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, Module(fail_at=4), callback)

    assert database.ask("SELECT outcome, outcome_message FROM source") == [("failed", "RuntimeError: out of luck")]
    assert callback.monitor is None


def test_a_plain_loop_can_log_what_it_knows_only_after_the_step(database: Database) -> None:
    model = fp8core.convert_to_fp8(nn.Linear(16, 16))
    with fp8scope.attach(model, run="plain", collector=database.address, config={"lr": 0.1, "n": 1}) as monitor:
        for _ in range(3):
            model(torch.randn(4, 16)).sum().backward()
            monitor.step(loss=1.0)
        monitor.log(val_loss=torch.tensor(2.0))
        monitor.log(1, bleu=3.0)
        monitor.log(val_loss="no number")  # type: ignore[arg-type]
        monitor.log_config({"lr": 0.2, "api_key": "hunter2"}, parameters=272)
        monitor.log_config(object())

    scalars = database.ask("SELECT name, step, value FROM scalar ORDER BY name, step")
    assert scalars == [("bleu", 1, 3.0), ("loss", 0, 1.0), ("loss", 1, 1.0), ("loss", 2, 1.0), ("val_loss", 2, 2.0)]
    assert database.ask("SELECT COUNT(*) FROM stats") == [(9,)]
    ((config,),) = database.ask("SELECT config_json FROM run")
    assert json.loads(config) == {"lr": 0.2, "n": 1, "api_key": "***", "parameters": 272}
