"""What FSDP2 and DeepSpeed add to a checkpoint beside the student's weights, which are always safetensors.

FSDP2: ``optimizer.bin``, the optimizer's state gathered on the first rank (``optimizer.pt`` where it has none). DeepSpeed: a
folder ``global_step*`` of its own files, one or two per rank. All are written by ``torch.save``, and read with
``weights_only=True``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from trl import SFTTrainer

_STATELESS, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def optimizer_files(trainer: SFTTrainer) -> str:
    """The pattern of what holds the optimizer's state in a checkpoint of this trainer."""
    if trainer.is_deepspeed_enabled:
        return "global_step*/*_optim_states.pt"
    return "optimizer.*" if trainer.is_fsdp_enabled else _STATELESS


def save_fsdp_state(trainer: SFTTrainer, folder: Path) -> None:
    """Optimizer and scheduler; the Trainer would write the whole student once more, as a pickle."""
    if trainer.optimizer.state:
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder))
    elif trainer.args.should_save:  # SGD without momentum: torch could not put nothing back together
        torch.save(trainer.optimizer.state_dict(), folder / _STATELESS)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER)


def load_stateless(trainer: SFTTrainer, folder: Path) -> bool:
    """Read back an optimizer without state that FSDP2 trained, and its scheduler; False if this is another one."""
    if not (trainer.is_fsdp_enabled and (folder / _STATELESS).is_file()):
        return False
    trainer.optimizer.load_state_dict(torch.load(folder / _STATELESS, weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
    return True


@contextmanager
def reading_safely(trainer: SFTTrainer) -> Iterator[None]:
    """DeepSpeed asks torch.load for ``weights_only=False``; in here it gets True, and the few classes that its files hold."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _deepspeed_classes() -> list[Any]:
    """Plain containers: a loss scale, the number of a stage, where a parameter lies in a flat buffer."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
