"""What rules suggest, written as the code that does it: format strings over {layer}, {role} and {recipe}, the tensor's.

A test runs each of them on a real model. `model`, `optimizer` and `loss` are the user's own; a call of `convert_to_fp8`
says what is to be added to the one that is there.
"""

from __future__ import annotations


def its_own(what: str) -> str:
    """A recipe or a format for this tensor alone."""
    return f"convert_to_fp8(model, recipe={{recipe}}, overrides=[Override({{layer!r}}, role={{role!r}}, {what})])"


ITS_OWN_AMAX = its_own("recipe=AmaxScaling()")
ITS_OWN_CURRENT = its_own("recipe=CurrentScaling()")
SHORT_HISTORY = its_own("recipe=DelayedScaling(history_len=16)")
BFLOAT16 = "convert_to_fp8(model, recipe={recipe}, module_filter_fn=lambda module, name: name != {layer!r})"
SKIP_STEP = "if not torch.isfinite(loss): optimizer.zero_grad(); continue  # before loss.backward()"
CLIP_GRADIENTS = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
