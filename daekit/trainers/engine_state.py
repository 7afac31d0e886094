"""What an engine adds to a checkpoint beside the student's weights, which are safetensors under every engine.

FSDP2: ``optimizer.bin``, the optimizer's state gathered on the first rank. DeepSpeed: a folder ``global_step*`` of its own
files, one or two per rank. All of them are written by ``torch.save``, and read with ``weights_only=True``.
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

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def optimizer_files(trainer: SFTTrainer) -> str:
    """The pattern of what holds the optimizer's state in a checkpoint of this trainer."""
    if trainer.is_deepspeed_enabled:
        return "global_step*/*_optim_states.pt"
    return "optimizer.bin" if trainer.is_fsdp_enabled else "optimizer.pt"


def save_fsdp_state(trainer: SFTTrainer, folder: str) -> None:
    """Optimizer and scheduler; the Trainer would write the whole student once more, as a pickle."""
    save_fsdp_optimizer(trainer.accelerator.state.fsdp_plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(folder) / "scheduler.pt")


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
