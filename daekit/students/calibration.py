"""Runs calibration text through a model once and shows observers what goes into and out of modules; no batch is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import frozen_forward
from daekit.models.scoring import TokenRow, batches

# (first input, output, real_BT): called after a module ran; real_BT is False where a token is padding
Observer = Callable[[Tensor, Tensor, Tensor], None]


def require_enough(rows: Sequence[TokenRow], units: int, what: str) -> None:
    """Raise UserError if the calibration text has fewer tokens than units that are ranked on it."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    if tokens < units:
        raise UserError(
            f"calibration text too short: {tokens} tokens in {len(rows)} rows, but {units} {what} are ranked on it; "
            f"give at least {units} tokens (some hundred rows are usual)"
        )


def run_hooked(model: PreTrainedModel, rows: Sequence[TokenRow], observers: Mapping[str, Observer], batch_size: int) -> None:
    """Run the rows through the backbone of ``model`` (no logits) and show the named modules' first input and output.

    Rows of like length share a batch, padded on the right. Runs in eval mode without gradient; the model is as before on
    leaving.
    """
    real_BT = torch.empty(0)

    def show(observe: Observer, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        observe(first, output[0] if isinstance(output, tuple) else output, real_BT.to(first.device))

    labelled = [{"labels": row["input_ids"], **row} for row in rows]  # which do not count here
    with frozen_forward(model), ExitStack() as hooks:
        for name, observe in observers.items():
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(show, observe), with_kwargs=True))
        for _, batch in batches(labelled, batch_size, "", model.device):
            real_BT = batch.row_BT >= 0
            model.base_model(**batch.inputs, use_cache=False)
