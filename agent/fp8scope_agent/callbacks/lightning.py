"""Lightning: `Trainer(..., callbacks=[Fp8scopeCallback(run="llama-fp8")])`.

Steps have Lightning's numbers, `trainer.global_step`, 1 after the first optimizer step. The loss of a step is the mean
of its micro-batches; what validation logs becomes scalars of the step before it.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..monitor import Monitor
from ..session import attach


class Fp8scopeCallback(Callback):  # type: ignore[misc]  # lightning is not typed for us
    """Attaches when training starts, records every optimizer step, closes when training ends, or fails.

    `arguments` are those of `attach`; the default `config` is the module's hparams.
    """

    def __init__(self, *, run: str, **arguments: Any) -> None:
        super().__init__()
        self.monitor: Monitor | None = None
        self._run = run
        self._arguments = arguments
        self._recorded = 0  # steps
        self._losses: list[torch.Tensor] = []  # of the micro-batches since then

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the module as it is trained: on its device, under its strategy."""
        hparams = {str(name): value for name, value in pl_module.hparams.items()}
        self.monitor = attach(pl_module, run=self._run, **{"config": hparams, **self._arguments})
        self._recorded = trainer.global_step
        self._losses = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the step, if the batch was the last one of it."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach())
        if self.monitor is not None and trainer.global_step > self._recorded:
            self._recorded = trainer.global_step
            # Lightning has divided each loss by the number of micro-batches, where it steps the optimizer itself.
            divided_by = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            scalars = {"loss": torch.stack(self._losses).mean() * divided_by} if self._losses else {}
            self._losses = []
            self.monitor.step(self._recorded, **scalars)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what validation logged."""
        if self.monitor is not None and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.monitor.log(self._recorded, **{str(name): value for name, value in metrics.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is finished."""
        self._end(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The run has failed."""
        self._end(exception)

    def _end(self, error: BaseException | None) -> None:
        if self.monitor is not None:
            self.monitor.__exit__(type(error) if error is not None else None, error, None)
            self.monitor = None
