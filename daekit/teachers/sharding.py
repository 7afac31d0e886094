"""Frozen models split over the ranks, as the student is: FSDP2 and ZeRO-3 gather them layer by layer, never whole.

With parts of a teacher on every rank, each of its forwards is a collective call: all ranks must run it, also one whose rows
all follow another teacher. ``Sharding.somewhere`` is how they agree.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from daekit.models.backbone import decoder_layers
from daekit.models.split_loading import read_parts, waits
from daekit.protocol import IGNORE_INDEX, Batch, Teacher, packed_lengths


class Sharding:
    """Frozen models under FSDP2 and ZeRO-3, which split them over the ranks, and ZeRO-2, which only rounds them.

    Args:
        accelerator: the trainer's, of type FSDP or DEEPSPEED.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device = accelerator.device
        self._fsdp = accelerator.distributed_type == DistributedType.FSDP
        self.splits = self._fsdp or accelerator.state.deepspeed_plugin.zero_stage == 3

    def split(self, model: PreTrainedModel) -> None:
        """Leave a part of a frozen model on each rank, in place and rounded as the student is.

        Of one that waits on the disk each rank then reads its part. Of one in 4 bits FSDP2 splits the packed bytes, and each
        rank holds all scales; it is not rounded. One in 8 bits, and a quantised one under ZeRO-3, stays whole on each rank.
        """
        quantised = getattr(model, "is_quantized", False)
        if quantised and not (self._fsdp and getattr(model, "is_loaded_in_4bit", False)):
            return
        if self._fsdp:
            self._split_fsdp(model, exact=quantised)
            if waits(model):
                read_parts(model)
            return
        if self.splits:
            config = self._accelerator.state.deepspeed_plugin.deepspeed_config
            _split_zero3(model, config, self._rounded or next(model.parameters()).dtype)
        else:
            self.hold(model)

    def hold(self, model: PreTrainedModel) -> None:
        """Leave a frozen model whole on this rank, rounded as the student is; a quantised one as it is."""
        if getattr(model, "is_quantized", False):
            return
        model.to(self.device)  # type: ignore[arg-type]
        for parameter in model.parameters():  # not the buffers: frequencies of rotary positions stay exact
            parameter.data = parameter.data.to(self._rounded or parameter.dtype)

    @property
    def _rounded(self) -> torch.dtype | None:
        """The dtype that the student's weights are cast to: by FSDP2's policy, by DeepSpeed itself (DDP has autocast)."""
        if self._fsdp:
            policy = self._accelerator.state.fsdp_plugin.mixed_precision_policy
            return policy and policy.param_dtype
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        return torch.bfloat16 if config.get("bf16", {}).get("enabled") else None

    def somewhere(self, wanted: Sequence[bool]) -> list[bool]:
        """Which of these is wanted on any rank. A collective call."""
        votes = torch.tensor(wanted, dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes.tolist()]

    def _split_fsdp(self, model: PreTrainedModel, exact: bool) -> None:
        """One unit per layer, and one of what is left; TRL's ``prepare_fsdp`` makes one of the whole model."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        plugin = self._accelerator.state.fsdp_plugin
        mesh = self._accelerator.torch_device_mesh
        options: dict[str, Any] = {
            "mesh": None if mesh is None else mesh[tuple(self._accelerator.parallelism_config.fsdp_dim_names)],
            # it rounds as the student does
            "mp_policy": MixedPrecisionPolicy() if exact else plugin.mixed_precision_policy or MixedPrecisionPolicy(),
            "offload_policy": plugin.cpu_offload,
            "reshard_after_forward": True,  # also the root, whose default is to stay whole
        }
        for layer in decoder_layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)


@runtime_checkable
class ShardableTeacher(Teacher, Protocol):
    """A teacher whose models can be split over the ranks; any other one is held whole by each rank."""

    def shard(self, sharding: Sharding) -> None:
        """Split the models of the teacher, in place of ``to(device)``; from then on ``outputs`` is a collective call."""
        ...


def shard_teacher(teacher: Teacher, sharding: Sharding) -> None:
    """Split what can be split, move the rest."""
    if isinstance(teacher, ShardableTeacher):
        teacher.shard(sharding)
    else:
        teacher.to(sharding.device)


def _split_zero3(model: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Hand a frozen model to DeepSpeed, which casts it to ``dtype``; its hooks gather each layer while it runs."""
    import deepspeed

    config = copy.deepcopy(config)
    for name in ("optimizer", "scheduler"):  # there is nothing to optimise
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["fp16"] = {"enabled": dtype == torch.float16}
    deepspeed.initialize(model=model, config=config)


def one_token(batch: Batch, domain: str) -> Batch:
    """A batch of one row of one token without loss, for a rank that runs a teacher only because another rank must."""
    token_11 = batch.inputs["input_ids"][:1, :1]
    if "attention_mask" in batch.inputs or "position_ids" not in batch.inputs:
        inputs = {"input_ids": token_11, "attention_mask": torch.ones_like(token_11)}
    else:
        inputs = {"input_ids": token_11, "position_ids": torch.zeros_like(token_11)}
        inputs |= packed_lengths(inputs["position_ids"])
    inputs |= {key: value for key, value in batch.inputs.items() if isinstance(value, bool)}
    return Batch(inputs, torch.full_like(token_11, IGNORE_INDEX), torch.zeros_like(token_11), (domain,))
