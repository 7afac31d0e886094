"""Hidden states of a model without its logits, reached through the model's own forward.

The loss must run *inside* the forward: accelerate wraps the forward for autocast, DDP and FSDP hang their hooks on it, and
a call past it gives gradients that differ between ranks without an error. So, as TRL does with its fused head, one keyword
is added to the forward before anything wraps it.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer

from daekit.errors import UserError
from daekit.models.heads import head_logits, output_head
from daekit.models.quantization import keep_four_bit_weights
from daekit.models.sharded import is_sharded, whole
from daekit.protocol import Batch


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself: ``model``, or the model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def checkpointed_layers(model: nn.Module) -> set[int]:
    """The layers that run twice in training, because gradient checkpointing is on for them."""
    checkpointed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    return {int(part.layer_idx) for layer in checkpointed for part in layer.modules() if hasattr(part, "layer_idx")}  # type: ignore[arg-type]


def add_on_hidden(model: nn.Module) -> None:
    """Add the keyword ``on_hidden`` to the model's forward, once; every model that daekit runs passes here.

    ``model(**inputs, on_hidden=f)`` runs the backbone only and returns ``f(outputs)``, where ``outputs`` are those of the
    backbone (``last_hidden_state [B,T,H]``, ``router_logits`` if asked for). Without the keyword the forward is as before.
    """
    base = base_of(model)
    original = base.forward
    if getattr(original, "takes_on_hidden", False):
        return

    @functools.wraps(type(base).forward)  # generate() validates its arguments against this signature
    def forward(self: PreTrainedModel, *args: Any, on_hidden: Callable[[Any], Any] | None = None, **inputs: Any) -> Any:
        if on_hidden is None:
            return original(*args, **inputs)
        inputs.pop("labels", None)  # PEFT passes labels=None along
        # looked up on each call, because FSDP and PEFT replace modules after this point
        return on_hidden(self.base_model(*args, **(inputs | {"use_cache": False})))

    keep_four_bit_weights(base)
    forward.takes_on_hidden = True  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of the weights as they stand, in eval mode and with the forward of its class.

    The forwards that TRL and ``add_on_hidden`` hang on an instance close over that instance: copied along, they would
    silently run the original's weights. Weights that ZeRO-3 has sharded are gathered one by one, into host memory.
    """
    parts = {id(p): nn.Parameter(whole(p), requires_grad=False) for p in model.parameters() if is_sharded(p)}
    twin = copy.deepcopy(model, dict(parts))
    twin.__dict__.pop("forward", None)
    return twin.requires_grad_(False).eval()


@contextmanager
def frozen_forward(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradient; the mode of every module is as before on leaving, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def hidden_at_loss_positions(model: nn.Module, batch: Batch) -> Tensor:
    """``[N, H]`` last hidden states at the loss positions of ``batch``; only these are stored."""
    return model(**batch.inputs, on_hidden=lambda outputs: batch.at_loss_positions(outputs.last_hidden_state))


def require_plain_head(model: PreTrainedModel, vocab_size: int) -> None:
    """Compare our logits with the model's own on two tokens.

    Some architectures change hidden states or logits between backbone and output (a transform, a cap of another name): their
    loss would be of other distributions than the model's, without an error. Parameters that ZeRO-3 has sharded cannot be run
    outside its engine; there the check is left out.

    Raises:
        UserError: they differ by more than rounding.
    """
    if is_deepspeed_zero3_enabled():
        return
    ids = torch.arange(2, device=base_of(model).device)[None] % vocab_size
    with frozen_forward(model):
        theirs = model(input_ids=ids).logits[0, :, :vocab_size]
        hidden = model(input_ids=ids, on_hidden=lambda outputs: outputs.last_hidden_state)[0]
        ours = head_logits(hidden, output_head(model, vocab_size)).to(theirs.device)
    if (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
        raise UserError(
            f"{type(base_of(model)).__name__}: its logits are not its output head applied to its last hidden states, "
            "so a loss on hidden states would not be a loss on its distribution. This architecture is not supported."
        )
