"""An adapter folded into its 16-bit base, saved as a plain model, and read back to see that it is the same model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daekit.errors import UserError
from daekit.models.adapters import tokenizer_spec
from daekit.models.loading import base_of_adapter, load_model, load_tokenizer_of, stored_settings, with_adapter
from daekit.models.vocabulary import vocabulary_size
from daekit.recipe.schema import Dtype, ModelSpec

# what rounding the merged weights once can do to logits, as a share of the largest logit
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "What is the sum of 17 and 25? It is 42, because 17 + 25 = 42.",
    "An order that has left the warehouse can be returned within thirty days.",
    "def f(x):\n    return x * x\n",
)


@dataclass(frozen=True)
class MergeCheck:
    """How far the merged model, read back from disk, is from the base with its adapter."""

    difference: float  # the largest of a logit
    adapter: float  # the largest difference that the adapter makes to a logit of the base
    largest: float  # logit
    kl: float  # KL(base with adapter || merged model), nats per token, the mean over the batch
    tokens: int  # of the batch
    dtype: torch.dtype  # of the merged weights

    @property
    def allowed(self) -> float:
        """The largest difference that rounding explains: never as much as the adapter itself does."""
        return min(_ROUNDING[self.dtype] * self.largest, max(self.adapter, 1e-4 * self.largest))

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"checked on {self.tokens} tokens in {name}: logits differ by at most {self.difference:.3g} (rounding explains "
            f"{self.allowed:.3g}; the adapter itself changes them by up to {self.adapter:.3g}, the largest is "
            f"{self.largest:.3g}), KL {self.kl:.3g} nats per token"
        )


def save_merged(folder: str | Path, out: str | Path, dtype: Dtype = "auto") -> MergeCheck:
    """Fold the LoRA adapter in ``folder`` into its unquantised base and save the result with its tokenizer.

    ``out`` comes into being only when the saved model has been read back and compared.

    Args:
        folder: directory that holds the adapter.
        out: a directory that does not exist yet.
        dtype: dtype of the result; ``auto``: that of the base.

    Raises:
        UserError: ``out`` or ``out.half`` exists, a quantised base, an adapter that does not fit it, a merged model that
            differs by more than rounding.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose a directory that does not")
    half = out.with_name(out.name + ".half")
    try:
        half.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{half}: exists already, and the merged model is written there first. If a merge that was stopped has left it, "
            "delete it; otherwise choose another OUT."
        ) from None
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another OUT") from error
    try:
        check = _save(folder, half, dtype)
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return check


def _save(folder: str | Path, out: Path, dtype: Dtype) -> MergeCheck:
    """Save the merged model and compare what is read back."""
    base = base_of_adapter(ModelSpec(adapter=str(folder), dtype=dtype), folder)
    if settings := stored_settings(str(base.path), base.revision):
        raise UserError(
            f"{base.path}: is quantised ({settings.get('quant_method')}); an adapter is merged into the 16-bit base. If you "
            f"have that, name it in base_model_name_or_path of {folder}/adapter_config.json."
        )
    tokenizer = load_tokenizer_of(tokenizer_spec(ModelSpec(adapter=str(folder))))
    model = with_adapter(load_model(base), Path(folder).expanduser()).eval()
    ids = [tokenizer(text)["input_ids"] for text in _SENTENCES]
    length = max(min(map(len, ids)), 1)
    ids_BT = torch.tensor([row[:length] for row in ids])  # cut to the shortest: no padding, so every position is compared
    size = vocabulary_size(tokenizer)
    adapted = _logits(model, ids_BT, size)
    with model.disable_adapter():
        bare = _logits(model, ids_BT, size)
    merged: Any = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    kept: torch.dtype = merged.dtype
    del model, merged  # only one model at a time in memory
    saved = _logits(load_model(ModelSpec(path=str(out), dtype="auto")).eval(), ids_BT, size)
    check = _compare(adapted, bare, saved, kept)
    if not check.difference <= check.allowed:
        raise UserError(
            f"{folder}: the merged model is not the base with its adapter: {check}. Rounding is less with --dtype float32."
        )
    return check


def _logits(model: nn.Module, ids_BT: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BT.to(next(model.parameters()).device)).logits[..., :size].float().cpu()


def _compare(adapted: Tensor, base: Tensor, saved: Tensor, dtype: torch.dtype) -> MergeCheck:
    log_adapted, log_saved = adapted.log_softmax(-1), saved.log_softmax(-1)
    kl = (log_adapted.exp() * (log_adapted - log_saved)).sum(-1).mean()
    difference, of_adapter, largest = ((adapted - saved).abs().max(), (adapted - base).abs().max(), adapted.abs().max())
    return MergeCheck(float(difference), float(of_adapter), float(largest), float(kl), saved[..., 0].numel(), dtype)
