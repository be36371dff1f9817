"""Hugging Face's `Trainer`: `Trainer(..., callbacks=[Fp8scopeCallback(run="llama-fp8")])`.

Steps have the Trainer's numbers, 1 for the first; what it logs (loss, grad_norm, learning_rate, eval_loss ...) becomes
scalars of the step that it logs them at. All ranks are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..monitor import Monitor
from ..session import attach


class Fp8scopeCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for us
    """Attaches when training begins, records every optimizer step, closes when training ends.

    `arguments` are those of `attach`. The default `run` is the Trainer's run_name, else the name of its output_dir; the
    default `config` its arguments (secrets masked) and the model's configuration.
    """

    def __init__(self, *, run: str | None = None, **arguments: Any) -> None:
        self.monitor: Monitor | None = None
        self._run = run
        self._arguments = arguments

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Attach to the model as it is trained: on its device, converted, wrapped."""
        self._close()  # a Trainer may train more than once, and is not told when training fails
        run = self._run or getattr(args, "run_name", None) or Path(args.output_dir).resolve().name
        self.monitor = attach(model, run=run, **{"config": _config(args, model), **self._arguments})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the optimizer step, all its micro-batches together."""
        if self.monitor is not None:
            self.monitor.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the numbers among what the Trainer logs; not the summary at its end."""
        if self.monitor is None or logs is None or "train_runtime" in logs:
            return
        numbers = {name: float(value) for name, value in logs.items() if type(value) in (int, float)}  # type: ignore[arg-type]  # are numbers
        self.monitor.log(state.global_step, **numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The run is finished."""
        self._close()

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None


def _config(args: TrainingArguments, model: nn.Module) -> dict[str, object]:
    own: Any = getattr(model, "config", None)
    return {"trainer": args.to_dict(), **({"model": own.to_dict()} if hasattr(own, "to_dict") else {})}
