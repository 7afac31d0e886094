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
from daekit.models.quantization import keep_four_bit_weights
from daekit.models.sharded import is_sharded, whole
from daekit.protocol import Batch


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself: ``model``, or the model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, return-value]


def backbone_of(base: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal language model whose last hidden states its output head is applied to.

    As a rule it is ``base_model``. Where that attribute leads nowhere (Llama 4) it is the part that holds the embeddings.

    Raises:
        UserError: there is none.
    """
    found: Any = base.base_model
    while found is base or found.get_output_embeddings() is not None:
        embeddings = found.get_input_embeddings()
        parts = [part for part in found.children() if isinstance(part, PreTrainedModel)]
        found = next((part for part in parts if any(module is embeddings for module in part.modules())), None)
        if found is None:
            raise UserError(
                f"{type(base).__name__}: no part of it gives the hidden states that its output head is applied to, so there is "
                "nothing to take the loss of. This architecture is not supported."
            )
    return found


def can_run(model: nn.Module) -> bool:
    """Whether a model can be run before the training begins.

    Not so where ZeRO-3 has sharded its parameters outside of its engine, and with FlashAttention before it is on its GPU.
    """
    base = base_of(model)
    flash = "flash" in (base.config.get_text_config()._attn_implementation or "")
    return not is_deepspeed_zero3_enabled() and not (flash and base.device.type == "cpu")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's text decoder, in order: the list of as many layers as the config says, by transformers' marks.

    Raises:
        UserError: an architecture that does not say which of its modules they are.
    """
    base = base_of(model)
    depth, kinds = base.config.get_text_config().num_hidden_layers, base._no_split_modules or ()

    def is_layer(module: nn.Module) -> bool:
        named = any(kind.__name__ in kinds for kind in type(module).__mro__)  # FSDP2 makes a subclass
        return named or isinstance(module, GradientCheckpointingLayer)

    lists = [part for part in backbone_of(base).get_decoder().modules() if isinstance(part, nn.ModuleList)]
    found = [list(part) for part in lists if len(part) == depth and all(map(is_layer, part))]
    if len(found) != 1:
        raise UserError(
            f"{type(base).__name__}: its layers could not be found, so hidden_weight must be 0 for this model, and it "
            "cannot be offloaded or split over ranks"
        )
    return found[0]


def checkpointed_layers(model: nn.Module) -> set[int]:
    """The layers that run twice in training, because gradient checkpointing is on for them."""
    twice = {id(m) for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing}
    return {index for index, layer in enumerate(decoder_layers(model)) if id(layer) in twice} if twice else set()


def add_on_hidden(model: nn.Module) -> None:
    """Add the keyword ``on_hidden`` to the model's forward, once; every model that daekit runs passes here.

    ``model(**inputs, on_hidden=f)`` runs the backbone only and returns ``f(outputs)``, where ``outputs`` are those of the
    backbone (``last_hidden_state [B,T,H]``, ``router_logits`` if asked for). Without the keyword the forward is as before.
    """
    base = base_of(model)
    original = base.forward
    if getattr(original, "takes_on_hidden", False):
        return
    own = isinstance(original, types.MethodType) and original.__self__ is base  # a deep copy must run its own weights
    run: Callable[..., Any] = original.__func__ if own else lambda _, *args, **inputs: original(*args, **inputs)  # type: ignore[attr-defined]

    @functools.wraps(type(base).forward)  # generate() validates its arguments against this signature
    def forward(self: PreTrainedModel, *args: Any, on_hidden: Callable[[Any], Any] | None = None, **inputs: Any) -> Any:
        if on_hidden is None:
            return run(self, *args, **inputs)
        inputs.pop("labels", None)  # PEFT passes labels=None along
        # looked up on each call, because FSDP and PEFT replace modules after this point
        return on_hidden(backbone_of(self)(*args, **(inputs | {"use_cache": False})))

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
