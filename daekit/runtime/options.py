"""What transformers and TRL say of a stage's options only when its training begins, or later: said before the first stage."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
from accelerate import PartialState
from httpx import HTTPError
from huggingface_hub import HfApi
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from daekit.errors import UserError, first_line, listed, nearest
from daekit.runtime.found import naming
from daekit.trainers import DomainSFTConfig
from daekit.trainers.features import feature_weights
from daekit.trainers.loss import divergence_metric
from daekit.trainers.selection import METRIC

_TRIED = (RuntimeError, AssertionError)  # what an option that is tried here may raise besides
_NEED_A_MODEL = ("lomo", "adalomo", "galore", "apollo")  # optimizers that transformers makes for a model only


def require_usable(arguments: DomainSFTConfig, student: PreTrainedModel | None) -> None:
    """Trackers, the hub, optimizer, scheduler, and options that do not go together.

    Args:
        student: The student without weights; None where it is not known yet, and an optimizer that is made for it not asked.

    Raises:
        UserError, ValueError, TypeError, ImportError: what is wrong.
    """
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        with naming("report_to", *_TRIED):  # its package is not installed
            callback()
    if arguments.push_to_hub and PartialState().is_main_process and (trouble := _trouble_of_hub()):
        raise UserError(f"push_to_hub: the hub does not say who you are ({trouble}); set HF_TOKEN, or leave it out")
    get_scheduler(
        arguments.lr_scheduler_type,
        _optimizer(arguments, student),
        num_warmup_steps=0,
        num_training_steps=1,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if arguments.padding_free and not arguments.packing and arguments.max_length is not None:
        raise UserError("padding_free: TRL takes it with packing only, or with max_length=null; set one of them")
    if arguments.torch_compile:
        with naming("torch_compile", *_TRIED):
            torch.compile(torch.nn.Identity(), backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
    if arguments.gradient_checkpointing:
        own = {key: each for key, each in (arguments.gradient_checkpointing_kwargs or {}).items() if key != "selective"}
        with naming("gradient_checkpointing_kwargs: torch says", *_TRIED):
            checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **{"use_reentrant": False} | own)


def require_metric(arguments: DomainSFTConfig, domains: Collection[str]) -> None:
    """What decides which checkpoint is kept must be known from an evaluation on rows of ``domains``.

    Raises:
        UserError: it is not, or is not named.
    """
    objective, metric = arguments.objective(), arguments.metric_for_best_model
    weights = {divergence_metric(objective): objective.prediction_weight} | feature_weights(objective)
    names = ["ce", "mean_token_accuracy", *(name for name, weight in weights.items() if weight)]
    names += [f"{name}_rows" for name in names] if objective.normalize == "rows" else []
    names += [f"{name}_on_policy" for name in names] if objective.on_policy else []
    known = ["loss", *names, *(f"{name}/{domain}" for name in names for domain in domains)]
    of_none = "no evaluation of this stage has such a metric"
    selection = arguments.selection()
    if selection is not None:
        selection.require_domains(domains)
        for name in selection.forgetting:
            if "/" in name and name not in known:
                raise UserError(f"select.forgetting.{name}: {of_none}{nearest(name, known)}")
    if arguments.save_strategy == "best" and metric is None:
        raise UserError("save_strategy=best needs metric_for_best_model: the name of a metric of the evaluation, such as loss")
    if metric is None or not (arguments.load_best_model_at_end or arguments.save_strategy == "best"):
        return
    if metric.removeprefix("eval_") not in [*known, *([METRIC] if selection is not None else [])]:
        raise UserError(
            f"metric_for_best_model={metric}: {of_none}; there are loss, "
            f"{listed(names)}, and these for a domain (ce/DOMAIN){nearest(metric, known)}"
        )


def _optimizer(arguments: DomainSFTConfig, student: PreTrainedModel | None) -> torch.optim.Optimizer:
    """The optimizer of one value, or, in place of one that is made for a model, another."""
    weight = [torch.nn.Parameter(torch.zeros(1))]
    with naming(f"optim={arguments.optim}", *_TRIED):
        if not arguments.optim.startswith(_NEED_A_MODEL):
            kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments)
            return kind(weight, **values)
        if student is not None:
            Trainer.get_optimizer_cls_and_kwargs(arguments, student)
    return torch.optim.SGD(weight, lr=1.0)


@cache
def _trouble_of_hub() -> str:
    """Why the hub does not know the user; empty if it does."""
    try:
        HfApi().whoami()
    except (OSError, ValueError, HTTPError) as error:
        return first_line(error)
    return ""
