"""Fits norms over fewer channels to what they gave over all of them, on calibration text; an option.

A norm divides by the root mean square of its channels (LayerNorm: by their deviation from their mean), so that without some
of them it gives other values for those that stay. For a norm of the teacher with outputs ``z = (x - m) / s`` before its
weight, and ``z'`` the same over the kept channels only, the least-squares fit of ``z`` by ``a z' + b`` over tokens and kept
channels is

    a = mean over tokens of s' / s        b = mean over tokens of (m' - m) / s        (RMSNorm: m = 0 and no b)

The fit is exact where the dropped channels are always 0. ``a`` goes into the norm's weight, ``b`` into its bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from daekit.models.scoring import TokenRow
from daekit.students.calibration import require_enough, run_hooked
from daekit.students.families import NORMS
from daekit.students.selection import Selection, require_valid
from daekit.students.shapes import Shape
from daekit.students.slicing import NormFit, kept_dims, require_plain


def fit_norms(
    model: PreTrainedModel, selection: Selection, rows: Sequence[TokenRow], *, batch_size: int = 8
) -> Mapping[str, NormFit]:
    """Scale and shift of every norm of ``model`` that the selection narrows, by its name; for ``slice_model``.

    Args:
        rows: Calibration text, ``input_ids`` per row.

    Raises:
        UserError: As ``slice_model``, or there are fewer tokens than channels.
    """
    family = require_plain(model)
    require_valid(model.config, selection)
    shape = Shape.of(model.config)
    require_enough(rows, shape.hidden_size, "channels")
    narrowed: dict[str, tuple[int, ...]] = {}
    if len(selection.hidden) < shape.hidden_size:
        names = [family.in_layer(layer, norm) for layer in selection.layers for norm in NORMS]
        narrowed = dict.fromkeys([*names, family.final_norm], selection.hidden)
    if selection.head_dim < shape.head_dim:
        dims = tuple(kept_dims(model.config, selection.head_dim))
        shared = [name for name, module in family.layer.items() if module.axes == ("dim",)]
        narrowed |= {family.in_layer(layer, name): dims for layer in selection.layers for name in shared}
    fits = {name: _Fit(model.get_submodule(name), kept) for name, kept in narrowed.items()}
    run_hooked(model, rows, fits, batch_size)
    return {name: fit.result() for name, fit in fits.items()}


class _Fit:
    """Running means of one norm; its input is ``[B, T, channels]``, or ``[B, T, heads, dims]``."""

    def __init__(self, norm: nn.Module, kept: Sequence[int]) -> None:
        self.centred = isinstance(norm, nn.LayerNorm)
        self.eps = float(norm.eps if self.centred else norm.variance_epsilon)  # type: ignore[arg-type]
        self.kept = torch.tensor(kept)
        self.scale, self.shift, self.count = 0.0, 0.0, 0

    def __call__(self, input: Tensor, _: Tensor, real_BT: Tensor) -> None:
        x = input.double()[real_BT]
        mean, size = self._mean_and_size(x)
        kept_mean, kept_size = self._mean_and_size(x[..., self.kept.to(x.device)])
        self.scale += float((kept_size / size).sum())
        self.shift += float(((kept_mean - mean) / size).sum())
        self.count += size.numel()

    def result(self) -> NormFit:
        return NormFit(self.scale / self.count, self.shift / self.count)

    def _mean_and_size(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(dim=-1) if self.centred else torch.zeros_like(x[..., 0])
        return mean, ((x - mean[..., None]).square().mean(dim=-1) + self.eps).sqrt()
