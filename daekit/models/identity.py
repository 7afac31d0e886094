"""A fingerprint of a model's weights: is this the same teacher that the run began with?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from daekit.models.sharded import shape_of, values_at

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and up to 64 evenly spaced values of every parameter: 16 hexadecimal digits.

    Reads a few kilobytes of a model of any size. Two trainings of one model differ in practically every value, so the
    samples tell them apart; a change of single values elsewhere is not seen.
    """
    return hash_tensors(model.named_parameters())


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The hash behind ``fingerprint`` over any named tensors. A collective where they are sharded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        shape = shape_of(tensor)
        index = torch.linspace(0, max(shape.numel() - 1, 0), min(_SAMPLES, shape.numel()), dtype=torch.float64).long()
        values = values_at(tensor, index).tolist()
        digest.update(repr((name, tuple(shape), str(tensor.dtype), values)).encode())
    return digest.hexdigest()[:16]
