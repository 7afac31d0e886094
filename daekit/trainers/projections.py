"""Learned matrices from the student's width to a wider or narrower teacher's, for the hidden-state loss.

They are trained with the student, so they live in it as a submodule (the optimizer, DDP and gradient clipping find them there);
they are no part of what it is saved as, so its state dict leaves them out, and a checkpoint keeps them in a file of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daekit.errors import UserError
from daekit.models.sharded import assign, whole

_NAME = "daekit_projections"
_FILE = "hidden_projections.safetensors"


class Projections(nn.Module):
    """One float32 matrix ``[teacher's width, student's width]`` for each (teacher's width, student's layer) of ``wanted``.

    Their initial values are uniform, as ``nn.Linear`` has them.
    """

    def __init__(self, width: int, wanted: Iterable[tuple[int, int]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrices = nn.ParameterDict()
        for other, layer in sorted(wanted):
            values = torch.empty(other, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            self.matrices[f"{other}_{layer}"] = nn.Parameter(values)

    def matrix(self, width: int, layer: int) -> Tensor:
        """The matrix onto a teacher's width for a layer of the student."""
        return self.matrices[f"{width}_{layer}"]

    def of_layer(self, layer: int) -> list[Tensor]:
        """All matrices of a layer of the student."""
        return [matrix for name, matrix in self.matrices.items() if name.endswith(f"_{layer}")]

    def live_in(self, student: nn.Module) -> None:
        """Become a submodule of the student that its state dict does not show."""
        student.add_module(_NAME, self.to(next(student.parameters()).device))
        student.register_state_dict_post_hook(_leave_out)
        student.register_load_state_dict_post_hook(_not_missing)

    def save(self, folder: Path, writes: bool) -> None:
        """Write the matrices beside the weights of a checkpoint; every rank must come here, one of them writes."""
        matrices = {name: whole(matrix) for name, matrix in self.matrices.items()}
        if writes:
            save_file(matrices, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read them back; UserError if they are not there or do not fit."""
        try:
            saved = load_file(folder / _FILE)
            for name, matrix in self.matrices.items():
                assign(matrix, saved[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder / _FILE}: the projections of the hidden-state loss cannot be read ({error})") from error


def forget_projections(student: object) -> None:
    """Remove the projections that an earlier trainer left in a student: nothing trains them, and a copy would hold them."""
    if isinstance(student, nn.Module) and hasattr(student, _NAME):
        delattr(student, _NAME)


def without_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that FSDP2 or DeepSpeed has gathered parameter by parameter, without the projections."""
    return {name: tensor for name, tensor in state.items() if f"{_NAME}." not in name}


def _leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{_NAME}.")]:
        del state[key]


def _not_missing(_: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if f"{_NAME}." not in key]
