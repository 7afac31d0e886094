"""What a run will write: whether it may, whether there is room, and which checkpoints will lie there in the end."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.trainers import DomainSFTConfig

_ADAM_STATES = 2  # values per trained value that the usual optimizers keep


def require_writable(root: Path) -> None:
    """Whether a directory can be made, and files in it, without making it."""
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file; name a directory")
        nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"{str(root)[:200]} cannot be used ({error.strerror}); choose another") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{root} cannot be made: {nearest} is no directory that may be written to; choose another")


def require_space(root: Path, name: str, arguments: DomainSFTConfig, student: PreTrainedModel) -> None:
    """Room for the result and one checkpoint, without which the stage is sure to fail, and a word where all do not fit."""
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    adapter = hasattr(student, "peft_config")
    trained = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    whole = trained if adapter else sum(p.numel() * p.element_size() for p in student.parameters())
    states = _ADAM_STATES if arguments.optim.startswith("adamw_torch") else 0  # others keep less: not sure to fail
    checkpoint = whole + states * trained if arguments.save_strategy != "no" else 0
    if whole + checkpoint > free:
        raise UserError(
            f"{root} has {free / 1e9:.1f} GB free, but stage {name!r} writes a model of {whole / 1e9:.1f} GB and "
            f"checkpoints of {checkpoint / 1e9:.1f} GB; free some space, or choose another directory"
        )


def checkpoints_at_end(arguments: DomainSFTConfig, rows: int) -> list[int] | None:
    """The steps whose checkpoints may lie on the disk at the end of a stage; None where only its course will tell.

    ``rows``: those that it is trained on.
    """
    if arguments.save_strategy == "no":
        return []
    epochs, selection = arguments.save_strategy == "epoch", arguments.selection()
    if not epochs and arguments.save_strategy != "steps":
        return None
    if epochs and selection is not None and selection.patience is not None:
        return None  # an epoch that is ended early is saved at whatever step it has reached
    if arguments.packing and (epochs or arguments.max_steps <= 0):
        return None  # the blocks are not counted yet
    batches = rows / (arguments.train_batch_size * arguments.world_size)
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * epoch)
    every = int(arguments.save_steps if arguments.save_steps >= 1 else max(1, math.ceil(arguments.save_steps * steps)))
    every = epoch if epochs else every
    saved = sorted({*range(every, steps + 1, every), steps})
    if arguments.metric_for_best_model is not None:  # the best is kept beside the last
        return saved
    return saved[-(arguments.save_total_limit or len(saved)) :]
