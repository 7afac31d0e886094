"""Runs calibration text through a model once and shows observers what goes into and out of modules; no batch is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import frozen_forward
from daekit.models.scoring import TokenRow

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
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    real: list[Tensor] = [torch.empty(0)]
    with frozen_forward(model), _hooks(model, observers, real):
        for start in range(0, len(order), batch_size):
            input_ids_BT, real_BT = _collate([rows[index] for index in order[start : start + batch_size]], model.device)
            real[0] = real_BT
            model.base_model(input_ids=input_ids_BT, attention_mask=real_BT.long(), use_cache=False)


@contextmanager
def _hooks(model: PreTrainedModel, observers: Mapping[str, Observer], real: list[Tensor]) -> Iterator[None]:
    def hook(observe: Observer) -> Callable[..., None]:
        def show(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = args[0] if args else kwargs["hidden_states"]
            observe(first, output[0] if isinstance(output, tuple) else output, real[0].to(first.device))

        return show

    with ExitStack() as hooks:
        for name, observe in observers.items():
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook(observe), with_kwargs=True))
        yield


def _collate(rows: Sequence[TokenRow], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    real = [torch.ones_like(each, dtype=torch.bool) for each in ids]
    return pad_sequence(ids, batch_first=True).to(device), pad_sequence(real, batch_first=True).to(device)
