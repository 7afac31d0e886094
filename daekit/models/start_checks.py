"""Before the first step a model is run on a few tokens: what a loss takes for granted must hold for its architecture.

Where ``can_run`` says no, nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import backbone_of, base_of, can_run, frozen_forward
from daekit.models.heads import head_logits, output_head
from daekit.models.sharded import whole_heads
from daekit.protocol import packed_lengths

_TOKENS = 16
_PACKED = (8, 13)  # tokens of two rows: longer than the convolutions of state-space layers
_HIGH = 100.0  # logits that every cap in use (10 to 60) changes by far more than rounding


def require_plain_head(model: PreTrainedModel, vocab_size: int) -> None:
    """Compare our logits with the model's own: on its hidden states, and on random ones whose logits reach 100.

    Some architectures change hidden states or logits between backbone and output (a transform, a cap of another name): their
    loss would be of other distributions than the model's, without an error.

    Raises:
        UserError: they differ by more than rounding (1e-4 of the largest, in 16 bits 2e-2); NaN or inf in the outputs.
    """
    if not can_run(model):
        return
    base = base_of(model)
    size = output_head(model, vocab_size).vocab_size
    ids = (torch.arange(_TOKENS, device=base.device) % size).expand(3, -1)

    def with_noise(hidden_3TH: Tensor) -> Tensor:
        """The states of the first row, and noise of their size and of the size that gives high logits."""
        noise_TH = torch.randn(hidden_3TH.shape[1:], generator=torch.Generator().manual_seed(0)).to(hidden_3TH)
        noise_TH *= hidden_3TH[0].float().pow(2).mean().sqrt().to(hidden_3TH.dtype)
        largest = _logits(model, noise_TH, size).abs().max()
        return torch.stack([hidden_3TH[0], noise_TH, noise_TH * (_HIGH / largest.clamp(min=0.1))])

    with frozen_forward(model), _last_hidden_states(model, with_noise) as seen:  # one forward: split models are gathered once
        logits_3TV = model(input_ids=ids, use_cache=False).logits[..., :size]
        if not seen:
            raise UserError(f"{type(base).__name__}: its forward does not run its own layers; is it a copy of a wrapped model?")
        _require_finite(model, seen[-1][0], logits_3TV[0])
        for states_TH, logits_TV in zip(seen[-1], logits_3TV, strict=True):
            ours_TV = _logits(model, states_TH, size).to(logits_TV.device)
            allowed = 2e-2 if states_TH.dtype.itemsize < 4 else 1e-4
            if not (ours_TV - logits_TV).abs().max() <= allowed * logits_TV.abs().max():
                raise UserError(
                    f"{type(base).__name__}: its logits are not its output head applied to its last hidden states, "
                    "so a loss on hidden states would not be a loss on its distribution. This architecture is not supported."
                )


def _logits(model: nn.Module, states_TH: Tensor, size: int) -> Tensor:
    with whole_heads([output_head(model, size)]) as heads:
        return head_logits(states_TH, heads[0])


def require_rows_apart(model: nn.Module, who: str) -> None:
    """Run two short rows packed into one sequence, and apart: their hidden states must be the same.

    Many families tell packed rows apart only under FlashAttention, and state-space layers often not at all: tokens would
    see the rows before theirs, without an error. Cost: two forwards of 21 tokens.

    Raises:
        UserError: they differ by more than rounding, or the model does not run packed rows.
    """
    base = base_of(model)
    if not can_run(model):
        return
    columns = base.get_input_embeddings().weight.shape[0]
    ids = torch.arange(sum(_PACKED), device=base.device) * 11 % min(columns, 1000)
    positions = torch.cat([torch.arange(length, device=base.device) for length in _PACKED])[None]
    with frozen_forward(model):
        apart = torch.cat([_hidden(model, {"input_ids": row[None]}) for row in ids.split(_PACKED)])
        inputs = {"input_ids": ids[None], "position_ids": positions} | packed_lengths(positions)
        try:
            packed = _hidden(model, inputs)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _cannot_pack(who, base, f"it does not run packed rows ({reason})") from error
    first, second = (_error(*parts) for parts in zip(packed.split(_PACKED), apart.split(_PACKED), strict=True))
    # nothing can leak into the first row: how far it is off is rounding, and the routing of experts that follows from it
    rounding = 2e-2 if apart.dtype.itemsize < 4 else 1e-4
    if not (first <= 0.2 and second <= min(max(rounding, 5 * first), 0.2)):
        raise _cannot_pack(who, base, f"packed rows see each other (hidden states of the second row differ by {second:.1%})")


def _cannot_pack(who: str, base: PreTrainedModel, reason: str) -> UserError:
    return UserError(
        f"packing: {who} ({base.config.model_type}, attn_implementation={base.config.get_text_config()._attn_implementation}): "
        f"{reason}. Set packing and padding_free to false, or load it with attn_implementation: flash_attention_2 if its "
        "family tells rows apart there."
    )


def _error(packed_TH: Tensor, apart_TH: Tensor) -> float:
    """The relative error of the median token: a flip of a token's experts by rounding does not count, a leak does."""
    packed_TH, apart_TH = packed_TH.double(), apart_TH.double()
    return float(((packed_TH - apart_TH).norm(dim=-1) / apart_TH.norm(dim=-1)).nan_to_num(torch.inf).median())


def _hidden(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, on_hidden=lambda outputs: outputs.last_hidden_state[0])


@contextmanager
def _last_hidden_states(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Change what the backbone hands to the rest of the model, and show what it got."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, outputs: Any) -> None:
        outputs["last_hidden_state"] = change(outputs["last_hidden_state"])
        seen.append(outputs["last_hidden_state"])

    backbone = backbone_of(base_of(model))
    # OPT's own forward calls the decoder inside of its backbone
    with ExitStack() as hooks:
        for part in {backbone, backbone.get_decoder()}:
            hooks.enter_context(part.register_forward_hook(hook))
        yield seen


def _require_finite(model: nn.Module, hidden: Tensor, logits: Tensor) -> None:
    for what, values in (("hidden states", hidden), ("logits", logits)):
        if not values.isfinite().all():
            base = base_of(model)
            raise UserError(
                f"{base.name_or_path or type(base).__name__}: its {what} hold NaN or inf on a few ordinary tokens: its weights "
                "are broken, or too large for its dtype. Load it in float32 or bfloat16, or take another checkpoint."
            )
