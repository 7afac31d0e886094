"""What FSDP2 and DeepSpeed add to a checkpoint beside the student's weights, which are always safetensors.

FSDP2: ``optimizer.bin``, the optimizer's state gathered on the first rank (``optimizer.pt`` where it has none). DeepSpeed: a
folder ``global_step*`` of its own files, one or two per rank. All are written by ``torch.save``, and read with
``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from trl import SFTTrainer

from daekit.environment import variable

_NUMBERED, _NAMED, _SCHEDULER = "optimizer.pt", "optimizer.bin", "scheduler.pt"


def optimizer_files(trainer: SFTTrainer) -> str:
    """The pattern of what holds the optimizer's state in a checkpoint of this trainer."""
    return "global_step*/*_optim_states.pt" if trainer.is_deepspeed_enabled else "optimizer.*"


def save_fsdp_state(trainer: SFTTrainer, folder: Path) -> None:
    """Optimizer and scheduler; the Trainer would write the whole student once more, as a pickle."""
    if trainer.optimizer.state:
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder))
    elif trainer.args.should_save:  # SGD without momentum: torch could not put nothing back together
        torch.save(trainer.optimizer.state_dict(), folder / _NUMBERED)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER)


def load_foreign_optimizer(trainer: SFTTrainer, folder: Path) -> bool:
    """Read what the Trainer does not: an optimizer without state, and what FSDP2 reads of DDP or DDP of FSDP2.

    Returns:
        False where it is the Trainer's own; otherwise the scheduler is read, too.
    """
    numbered, named = folder / _NUMBERED, folder / _NAMED
    if trainer.is_deepspeed_enabled or (named if trainer.is_fsdp_enabled else numbered).is_file():
        return False
    saved = torch.load(numbered if trainer.is_fsdp_enabled else named, map_location="cpu", weights_only=True)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    order = [names[id(parameter)] for group in trainer.optimizer.param_groups for parameter in group["params"]]
    if not trainer.is_fsdp_enabled:
        trainer.optimizer.load_state_dict(_renamed(saved, {name: number for number, name in enumerate(order)}))
    elif saved["state"]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        by_name, how = _renamed(saved, dict(enumerate(order))), StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, by_name, options=how)
    else:
        trainer.optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
    return True


def _renamed(saved: Mapping[str, Any], names: Mapping[Any, Any]) -> dict[str, Any]:
    """The state of an optimizer whose parameters have other names."""
    state = {names[key]: value for key, value in saved["state"].items()}
    groups = [group | {"params": [names[key] for key in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


@contextmanager
def reading_safely(trainer: SFTTrainer) -> Iterator[None]:
    """DeepSpeed asks torch.load for ``weights_only=False``; in here it gets True, and the few classes that its files hold."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    with variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"), torch.serialization.safe_globals(_deepspeed_classes()):
        yield


def _deepspeed_classes() -> list[Any]:
    """Plain containers: a loss scale, the number of a stage, where a parameter lies in a flat buffer."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
