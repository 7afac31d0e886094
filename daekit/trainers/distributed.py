"""How the ranks of a run share the work (DDP, FSDP2, ZeRO), and whether it is what the launch asked for.

accelerate goes on with less than it was told, without a word: one process instead of several, DDP instead of FSDP. A student
that was to be split over eight GPUs would then not fit, or eight students would be trained apart.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_deepspeed_available, str_to_bool
from peft import PeftConfig, PeftModel
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from daekit.environment import ranks_here
from daekit.errors import UserError
from daekit.models.adapters import reads_base
from daekit.models.experts import QuantisedExperts
from daekit.models.loading import say_whole
from daekit.models.quantization import pack_as

_RANK = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # set by a launcher of ranks
_BITSANDBYTES = ("bnb", "8bit", "32bit", "paged", "lion", "ademamix")  # in the names of its optimizers


def is_rank() -> bool:
    """Whether a launcher of ranks has started this process."""
    return any(name in os.environ for name in _RANK)


def refuse_launch(deepspeed: bool = False) -> None:
    """What can be known to be wrong with a launch before anything is loaded.

    Args:
        deepspeed: whether the trainer's arguments ask for DeepSpeed, as the launch may do, too.

    Raises:
        UserError: more ranks than devices, one process where several were asked for, or DeepSpeed that is not there.
    """
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    ranks = ranks_here()
    on_cpus, deepspeed = _asked("ACCELERATE_USE_CPU"), deepspeed or _asked("ACCELERATE_USE_DEEPSPEED")
    if devices and ranks > devices and not on_cpus:
        raise UserError(
            f"{ranks} processes were launched on this machine, which has {devices} "
            f"{torch.accelerator.current_accelerator()} device(s): ranks cannot share one. Launch with --num_processes "
            f"{devices} (torchrun: --nproc_per_node {devices}), or make more devices visible (CUDA_VISIBLE_DEVICES)."
        )
    # accelerate's launcher for one process sets the address of a main process only if it was asked for several
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and not is_rank():
        raise UserError(
            "accelerate launch was asked for several processes but has started one (it does so with --cpu, and with "
            "distributed_type MULTI_CPU or NO): use --multi_gpu --num_processes N, which runs on CPUs, too, or a file of "
            "recipes/accelerate/."
        )
    if deepspeed and not is_deepspeed_available():
        raise UserError(
            "DeepSpeed is not installed: pip install 'daekit[deepspeed]', or launch with recipes/accelerate/fsdp2.yaml"
        )
    if on_cpus and _asked("ACCELERATE_USE_DEEPSPEED"):
        raise UserError("ACCELERATE_USE_CPU=true: DeepSpeed would become DDP without a word. Leave the variable unset.")


def connect(args: TrainingArguments) -> None:
    """Tell accelerate the truth about the processes where there is no GPU; refuse what cannot work before models are loaded.

    On a CPU accelerate would drop FSDP in silence, as it does for every distributed type but that of a GPU; and DeepSpeed has
    to be told of the process group, which on a GPU it has made itself.

    Raises:
        UserError: processes that would train alone; settings of FSDP or DeepSpeed that the trainers cannot follow.
    """
    state = args.distributed_state
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched but this one knows of {state.num_processes}: each would train alone, over the "
            "others' files. Leave use_configured_state out of accelerator_config; without GPUs set use_cpu=True."
        )
    on_cpus = state.distributed_type == DistributedType.MULTI_CPU
    if _asks_for_fsdp(args):
        _refuse_fsdp(args)
        if on_cpus:
            state.distributed_type = DistributedType.MULTI_GPU
    if _asks_for_deepspeed(args):
        _refuse_deepspeed(args)
        if on_cpus:
            import deepspeed

            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def _asks_for_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or _asked("ACCELERATE_USE_FSDP")


def _asks_for_deepspeed(args: TrainingArguments) -> bool:
    return bool(args.deepspeed) or _asked("ACCELERATE_USE_DEEPSPEED")


def _asked(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _refuse_fsdp(args: TrainingArguments) -> None:
    settings = args.fsdp_plugin_args or {}  # what is not given is taken from the launch
    version = int(settings.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise UserError(f"fsdp_version: {version} is not supported, it is deprecated in torch; set fsdp_version: 2")
    optim = str(getattr(args.optim, "value", args.optim))
    if "torch" not in optim and any(part in optim for part in _BITSANDBYTES):
        raise UserError(
            f"optim: {optim} is of bitsandbytes, which cannot step on parameters that FSDP2 has split. Use adamw_torch, or "
            "launch with recipes/accelerate/ddp.yaml."
        )
    plugin = FullyShardedDataParallelPlugin(**settings)
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError(
            f"fsdp_state_dict_type: {plugin.state_dict_type.name} is not supported: the index of such a checkpoint is a "
            "pickle, and the student could not be loaded from it. Set fsdp_state_dict_type: FULL_STATE_DICT."
        )
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            "fsdp_cpu_ram_efficient_loading: true is not supported: only the first rank would hold the weights of student and "
            "teachers when they are checked and frozen. Set it to false: each rank reads its own part where it can."
        )


def reads_parts(args: SFTConfig, student: bool = False, adapter: PeftConfig | None = None) -> bool:
    """Whether each rank shall read its own part of the models from the disk (``split_loading.py``): under FSDP2.

    Where something stands against it, the user is told so.

    Args:
        args: the trainer's.
        student: whether it is about the student, which its trainer puts more on than a teacher.
        adapter: that the trainer will put on the student.
    """
    if not _asks_for_fsdp(args) or args.world_size == 1:
        return False
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    reasons: dict[str, Any] = {"fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy)}
    if student:
        base = adapter and reads_base(adapter)
        reasons |= {
            "fsdp_activation_checkpointing": plugin.activation_checkpointing,
            "torch_compile": args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO") != "NO",
            "chat_template_path": args.chat_template_path,
            str(base): base,
        }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is not None:
        say_whole("the student" if student else "teachers", found)
    return found is None


def _refuse_deepspeed(args: TrainingArguments) -> None:
    zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise UserError(
            "zero3_save_16bit_model: false is not supported: the student's weights would be saved in DeepSpeed's pickles only. "
            "Set it to true (in a JSON config stage3_gather_16bit_weights_on_model_save)."
        )
    if zero["stage"] not in (2, 3):
        raise UserError(f"zero_stage: {zero['stage']} is not supported; use 2 or 3, or recipes/accelerate/ddp.yaml")


def require_distribution(trainer: SFTTrainer) -> None:
    """Raise UserError where the engine is not what was asked for, or does what the trainers cannot follow."""
    accelerator, args = trainer.accelerator, trainer.args
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        raise UserError("context and sequence parallelism are not supported: the loss needs whole sequences on each rank")
    loading = accelerator.dataloader_config
    if accelerator.num_processes > 1 and (loading.split_batches or not loading.even_batches):
        raise UserError(
            f"accelerator_config: split_batches={loading.split_batches}, even_batches={loading.even_batches}: the rows that a "
            "rank trains on would not be those that are counted and logged. Leave both at their defaults (False, True)."
        )
    asked = {DistributedType.FSDP: _asks_for_fsdp(args), DistributedType.DEEPSPEED: _asks_for_deepspeed(args)}
    for kind, is_asked in asked.items():
        if is_asked and accelerator.distributed_type != kind:
            raise UserError(
                f"{kind.value} was asked for, but the processes run as {accelerator.distributed_type.value}: launch with "
                "`accelerate launch --config_file` and a file of recipes/accelerate/, without --cpu."
            )
    if getattr(trainer.model, "is_quantized", False):
        _split_quantised(trainer)


def _split_quantised(trainer: SFTTrainer) -> None:
    """Make the packed weights of a 4-bit student ones that FSDP2 splits (ZeRO-3 splits bytes as they are).

    Raises:
        UserError: what no engine splits; scales of experts, which are parameters that DeepSpeed and FSDP2 would round.
    """
    experts = any(isinstance(module, QuantisedExperts) for module in trainer.model.modules())
    rounds = trainer.is_deepspeed_enabled and trainer.args.bf16
    if shards_parameters(trainer) and not getattr(trainer.model, "is_loaded_in_4bit", False):
        wrong = "other quantised weights than bitsandbytes' 4 bits cannot be split over ranks by FSDP2 and ZeRO-3"
    elif experts and (rounds or shards_parameters(trainer)):
        wrong = "quantised experts cannot be trained under FSDP2, ZeRO-3 and, with bf16, ZeRO-2, which would round their scales"
    else:
        if trainer.is_fsdp_enabled:
            policy = trainer.accelerator.state.fsdp_plugin.mixed_precision_policy
            pack_as(trainer.model, (policy and policy.param_dtype) or torch.float32)
        return
    raise UserError(
        f"a student with {wrong}: launch with recipes/accelerate/ddp.yaml, where each rank holds its weights whole, or train "
        "it in 16 bits"
    )


def refuse_reentrant(trainer: SFTTrainer) -> None:
    """UserError where TRL sets reentrant checkpointing, under which attention and hidden-state losses teach nothing."""
    zero3 = trainer.is_deepspeed_enabled and shards_parameters(trainer)
    if zero3 and trainer.args.gradient_checkpointing and isinstance(trainer.model, PeftModel):
        raise UserError(
            "gradient_checkpointing=True: under ZeRO-3 an adapter is trained with reentrant checkpointing, with which "
            "attention_weight and hidden_weight would teach nothing. Set it to False, or use FSDP2 (recipes/accelerate)."
        )


def require_wrapped(trainer: SFTTrainer) -> None:
    """UserError for an evaluation before the training: FSDP2 and ZeRO split a student only together with its optimizer."""
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and not trainer.accelerator._models:
        raise UserError(
            "evaluate() before train(): FSDP and DeepSpeed take the student only together with its optimizer. Call train() "
            "first (eval_on_start=True evaluates at its beginning), or evaluate under recipes/accelerate/ddp.yaml."
        )


def shards_parameters(trainer: SFTTrainer) -> bool:
    """Whether each rank holds a part of every parameter: FSDP and ZeRO-3."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    return trainer.is_fsdp_enabled


def rounding(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """What the student's forward runs in: autocast, or nothing where FSDP2 or DeepSpeed rounds the weights themselves."""
    by_weights = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return nullcontext() if by_weights else accelerator.autocast()
