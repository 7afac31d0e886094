"""Queries and keys of a model's attention layers, captured where transformers calls its attention function.

The model keeps running SDPA or FlashAttention: an attention function that calls the original and shows its arguments to an
observer is registered beside each original one, and a model uses it only inside ``capture_attention``. No attention map is
made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from daekit.errors import UserError
from daekit.models.backbone import base_of
from daekit.protocol import Batch

_PREFIX = "daekit_"  # "flash" must stay part of the name: transformers looks for it
_OBSERVER = "_daekit_attention_observer"
_CHECKED_QUERIES = 16  # of a batch: enough to tell another kind of mask, and nothing beside the T^2 of a whole one


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one call of an attention function."""

    layer: int  # its index in the model
    query_BATD: Tensor  # after rotary embedding
    key_BGTD: Tensor  # not repeated for grouped queries
    scaling: float  # factor of the scores
    window: int | None  # tokens that a query of sliding-window attention sees; None: all
    mask: Tensor | None  # [B, 1, T, T] of SDPA, True (or 0.0) where attention is allowed; None where it is plainly causal
    flash: bool  # whether FlashAttention runs, which has no mask of that form


AttentionObserver = Callable[[AttentionCall], None]


@contextmanager
def capture_attention(model: nn.Module, observer: AttentionObserver) -> Iterator[None]:
    """Call ``observer`` with every attention call of ``model``; the model is as before on leaving, also after an error.

    With gradient checkpointing the calls come once more in the backward pass, so it must run inside, too. May be nested:
    the innermost observer of a model gets the calls.

    Raises:
        UserError: an attention implementation that cannot be captured, or (while it runs) one whose weights are not the softmax
            of scaled scores under a causal mask: sinks, capped scores, position biases.
    """
    base = base_of(model)
    config, before = base.config, base.config._attn_implementation
    modules = [module for module in base.modules() if hasattr(module, "layer_idx")]
    observers = [vars(module).get(_OBSERVER) for module in modules]
    config._attn_implementation = capturing_function(before, type(base).__name__)
    try:
        for module in modules:
            vars(module)[_OBSERVER] = observer
        yield
    finally:
        config._attn_implementation = before
        for module, outer in zip(modules, observers, strict=True):
            vars(module)[_OBSERVER] = outer


def require_row_mask(call: AttentionCall, batch: Batch) -> None:
    """Compare the mask that SDPA was given with the one that the loss assumes: causal, within the row, within the window.

    Some of the queries at loss positions are compared, the first and the last among them. FlashAttention has no mask: its
    boundaries of rows are those that the collator wrote down.

    Raises:
        UserError: they differ.
    """
    places = batch.loss_mask_BT.nonzero()
    if call.flash or not len(places):
        return
    index = torch.linspace(0, len(places) - 1, min(len(places), _CHECKED_QUERIES), device=places.device).long()
    sequence_Q, position_Q = places[index].T
    row_BT = batch.row_BT
    key_T = torch.arange(row_BT.shape[1], device=row_BT.device)
    expected_QT = (row_BT[sequence_Q] == row_BT[sequence_Q, position_Q][:, None]) & (key_T <= position_Q[:, None])
    if call.window is not None:
        expected_QT &= position_Q[:, None] - key_T < call.window
    if call.mask is None:
        allowed_QT = key_T <= position_Q[:, None]
    else:
        rows_QT = call.mask.expand(row_BT.shape[0], -1, -1, -1)[sequence_Q.to(call.mask.device), 0, position_Q, : len(key_T)]
        allowed_QT = rows_QT if rows_QT.dtype == torch.bool else rows_QT == 0
    if not torch.equal(allowed_QT.to(expected_QT.device), expected_QT):
        raise UserError(
            f"attention of layer {call.layer}: its mask is not causal within the row and its window, so the attention loss "
            "would compare other weights than the model's. Set attention_weight to 0 for this model."
        )


def capturing_function(implementation: str, model: str) -> str:
    """The name of the attention function that calls ``implementation`` and shows its arguments; registered when first used.

    Raises:
        UserError: an implementation that cannot be captured; ``model`` is what the message calls the model.
    """
    if implementation.startswith(_PREFIX):
        return implementation
    if implementation not in ALL_ATTENTION_FUNCTIONS or not (implementation == "sdpa" or "flash" in implementation):
        raise UserError(
            f"{model}: the attention loss works with attn_implementation sdpa or flash attention, not {implementation!r}; "
            "load the model with one of them, or set attention_weight to 0"
        )
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _showing(implementation))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _showing(implementation: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Any:
        config: Any = module.config
        config._attn_implementation = implementation  # FlashAttention looks there for the kernel to call
        try:
            output = ALL_ATTENTION_FUNCTIONS[implementation](module, query, key, value, attention_mask, **options)
        finally:
            config._attn_implementation = _PREFIX + implementation
        observer: AttentionObserver | None = vars(module).get(_OBSERVER)
        if observer is not None:
            _require_plain_softmax(module, query, key, options)
            scaling = options.get("scaling")
            observer(
                AttentionCall(
                    layer=int(module.layer_idx),  # type: ignore[arg-type]
                    query_BATD=query,
                    key_BGTD=key,
                    scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
                    window=options.get("sliding_window"),
                    mask=attention_mask,
                    flash=implementation != "sdpa",
                )
            )
        return output

    return attention


def _require_plain_softmax(module: nn.Module, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    extras = {name: options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")}
    extras["sinks"] = hasattr(module, "sinks")
    extras["is_causal=False"] = not options.get("is_causal", getattr(module, "is_causal", True))
    extras["a cache"] = query.shape[2] != key.shape[2]
    found = [name for name, there in extras.items() if there]
    if found:
        raise UserError(
            f"{type(module).__name__}: its attention has {', '.join(found)}, so its weights are not the causal softmax of "
            "scaled scores that the attention loss compares. Set attention_weight to 0 for this model."
        )
