"""Configs of the trainers: TRL's SFTConfig and what distillation adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from daekit.data.preparation import OVERLONG
from daekit.errors import UserError
from daekit.recipe.objective import DIVERGENCES, Objective, Selection
from daekit.recipe.trainer_options import ONLY_VALUE
from daekit.trainers.distributed import connect, refuse_launch


def _option(default: Any, about: str, choices: Sequence[str] = ()) -> Any:
    """A field that ``HfArgumentParser`` can read and explain."""
    metadata: dict[str, Any] = {"help": " ".join(about.split()).replace("%", "%%")}
    return field(default=default, metadata=metadata | ({"choices": list(choices)} if choices else {}))


def _setting(name: str, choices: Sequence[str] = ()) -> Any:
    """A field with default and documentation of the setting of that name in ``Objective``."""
    setting = Objective.model_fields[name]
    return _option(setting.default, setting.description or "", choices)


def cuts_rows(args: SFTConfig, packing: bool) -> bool:
    """Whether rows that are packed are cut in two where a block ends; the strategy None is TRL's bfd."""
    return packing and args.packing_strategy not in ("bfd", None)


@dataclass
class DomainSFTConfig(SFTConfig):
    """SFTConfig for rows that have a domain.

    Options that would change the objective without a word are refused: label smoothing, NEFTune, another ``loss_type``,
    ``average_tokens_across_devices=False``, ``truncation_mode="keep_end"``, and what else ``ONLY_VALUE`` of
    ``daekit.recipe.trainer_options`` names. The load-balancing loss of a mixture-of-experts student is 0 unless set.
    """

    overlong: str = _option(
        "error", "Rows longer than max_length tokens: 'error', 'truncate' or 'drop', counted per domain.", OVERLONG
    )
    assistant_only_loss: bool | None = _option(
        None,
        "Which tokens of messages rows carry loss. None: the response's, by the generation markers of the chat template, or "
        "else those of the last assistant turn. True, False: as in TRL, what the markers enclose, or all tokens.",
    )
    router_aux_loss_coef: float | None = _option(
        0.0, "Weight of the load-balancing loss of a mixture-of-experts student (0: none)."
    )
    logging_nan_inf_filter: bool = _option(False, "Hide NaN and infinite losses from the log. Off: they are shown as they are.")

    def __post_init__(self) -> None:
        refuse_launch(bool(self.deepspeed))
        # without it the processes that torchrun starts on a CPU would each train alone, over each other's files
        if not torch.accelerator.is_available():
            self.use_cpu = True
        # SFTConfig turns bf16 on by default, which raises on a CPU
        if self.bf16 is None and not self.fp16 and self.use_cpu:  # type: ignore[has-type]
            self.bf16 = False
        super().__post_init__()
        connect(self)
        for name, (only, reason) in ONLY_VALUE.items():
            if getattr(self, name) != only:
                raise UserError(f"{name}={getattr(self, name)!r} is not supported: {reason}. Leave it at its default.")
        if self.activation_offloading and (self.use_cpu or torch.accelerator.current_accelerator() is None):
            raise UserError(
                "activation_offloading=True: activations are kept in host memory while they wait for the backward pass, but "
                "this training is on the CPU, where they are already. Leave it out."
            )
        if self.overlong not in OVERLONG:
            raise UserError(f"overlong: {self.overlong!r} is unknown; choose one of {', '.join(OVERLONG)}")

    def objective(self) -> Objective:
        """What is trained: cross-entropy alone."""
        return Objective(ce_weight=1.0, prediction_weight=0.0)

    def selection(self) -> Selection | None:
        """By what a checkpoint is chosen; None where the last, or the best of one metric, is kept."""
        return None


def is_evaluated(args: DomainSFTConfig) -> bool:
    """Whether validation rows are looked at while the student trains."""
    return args.eval_strategy != "no" or args.eval_on_start


def written_tokens(args: DomainSFTConfig) -> int:
    """Tokens that the student may write behind a prompt of a training row; 0 where it writes none."""
    objective = args.objective()
    return objective.max_new_tokens if objective.on_policy else 0


_RENAMED = {"on_policy": "on_policy_fraction"}  # of ``Objective`` -> of KDConfig, among the arguments of a whole training


@dataclass
class KDConfig(DomainSFTConfig):
    """DomainSFTConfig with the settings of ``daekit.recipe.objective.Objective``, which documents each of them.

    ``loss = (ce_weight * CE + prediction_weight * T^2 * D(teacher, student) + attention_weight * A + hidden_weight * H) / N``
    with N the loss tokens of the global batch; CE, D and A in nats, H without unit ("A Teacher Is Worth A Million
    Instructions", arXiv 2406.19112). ``attention_layers`` and ``hidden_layers`` may also be pairs of (student's layer,
    teacher's layer). ``on_policy_fraction`` is its ``on_policy``. ``teacher_max_length`` bounds what a teacher sees of a row
    with a ``teacher_prompt``, in tokens; longer rows fall under ``overlong``, and None means ``max_length``. ``select``
    (``{"gain": "shop", "forgetting": {"general": 0.05}, "patience": 3}``, documented by ``Selection``) needs ``eval_strategy``.
    """

    ce_weight: float = _setting("ce_weight")
    prediction_weight: float = _setting("prediction_weight")
    attention_weight: float = _setting("attention_weight")
    divergence: str = _setting("divergence", DIVERGENCES)
    beta: float = _setting("beta")
    skew_alpha: float = _setting("skew_alpha")
    temperature: float = _setting("temperature")
    teacher_max_length: int | None = _option(
        None, "max_length of what a teacher sees of a row with teacher_prompt; default: max_length."
    )
    attention_layers: str = _setting("attention_layers")  # or pairs; HfArgumentParser can read neither Any nor a union
    attention_relation_heads: int | None = _setting("attention_relation_heads")
    hidden_weight: float = _setting("hidden_weight")
    hidden_loss: str = _setting("hidden_loss", ("cosine", "mse"))
    hidden_layers: str = _setting("hidden_layers")
    normalize: str = _setting("normalize", ("tokens", "rows"))
    on_policy_fraction: float = _setting("on_policy")
    max_new_tokens: int = _setting("max_new_tokens")
    rollout_temperature: float = _setting("rollout_temperature")
    rollout_buffer: int = _setting("rollout_buffer")
    select: dict | None = field(  # type: ignore[type-arg]  # HfArgumentParser reads no other
        default=None,
        metadata={"help": "Keep the checkpoint that gained most of those that forgot little; see recipe.objective.Selection."},
    )

    def __post_init__(self) -> None:
        if self.select is not None:
            self._select_best()
        super().__post_init__()
        self.objective()  # says what is wrong now and not when a trainer is made
        selective = self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("selective")
        if self.attention_weight and selective:
            raise UserError(
                "gradient_checkpointing_kwargs={'selective': True}: it does not let the second run of a layer compute "
                "the gradient of the attention loss. Leave it out, or set attention_weight to 0."
            )
        if self.torch_compile and (self.attention_weight or self.hidden_weight):
            raise UserError(
                "torch_compile=True: attention and hidden states are caught by hooks that each step hangs into the layers, and "
                "a layer that is compiled looks for no new hooks. Leave it out, or set attention_weight and hidden_weight to 0."
            )
        if self.torch_compile and self.on_policy_fraction:
            raise UserError(
                "torch_compile=True: was not tried with on-policy rows, for which layers would be compiled for each length of "
                "a response. Leave it out, or set on_policy_fraction (on_policy) to 0."
            )
        self._refuse_lengths()

    def _select_best(self) -> None:
        """Let the Trainer keep the checkpoint with the highest score."""
        if self.eval_strategy == "no":
            raise UserError(f"select={self.select}: nothing is evaluated; set eval_strategy, and give validation rows")
        metric: str | None = self.metric_for_best_model  # type: ignore[has-type]
        if metric not in (None, "selection"):
            raise UserError(f"metric_for_best_model={metric!r}: select chooses the checkpoint; leave it out")
        self.load_best_model_at_end, self.metric_for_best_model, self.greater_is_better = True, "selection", True

    def selection(self) -> Selection | None:
        """Which checkpoint is kept; UserError for a setting that is out of bounds."""
        return None if self.select is None else Selection.of(self.select)

    def _refuse_lengths(self) -> None:
        if self.on_policy_fraction and self.packing:
            raise UserError(
                f"packing=True (packing_strategy={self.packing_strategy!r}): rows would be laid into blocks of max_length "
                "before the student has written their responses. Set padding_free=True with max_length=None, which wastes no "
                "padding either, or on_policy_fraction (on_policy) to 0."
            )
        if self.normalize == "rows" and cuts_rows(self, self.packing):
            raise UserError(
                f"packing_strategy={self.packing_strategy!r} cuts rows in two, and normalize='rows' would count each piece as "
                "a row. Use packing_strategy='bfd', or normalize='tokens'."
            )
        if self.on_policy_fraction and self.max_length is not None and self.max_new_tokens >= self.max_length:
            raise UserError(
                f"max_new_tokens={self.max_new_tokens}: leaves no room for a prompt within max_length={self.max_length}; lower "
                "it, or raise max_length"
            )

    def objective(self) -> Objective:
        """What is trained; UserError for a setting that is out of bounds."""
        return Objective.of({name: getattr(self, _RENAMED.get(name, name)) for name in Objective.model_fields})

    @staticmethod
    def settings(objective: Objective) -> dict[str, Any]:
        """The arguments of a config that say ``objective``."""
        return {_RENAMED.get(name, name): value for name, value in vars(objective).items()}


@dataclass
class DAEConfig(KDConfig):
    """KDConfig for Domain Alignment from Expert.

    Args:
        reference_domains: domains whose rows follow the frozen reference. A domain that is neither here nor among the
            teachers is an error, so that a misspelt domain never follows the reference.
    """

    reference_domains: list[str] = field(
        default_factory=lambda: ["general"], metadata={"help": "Domains whose rows follow the frozen reference."}
    )

    def __post_init__(self) -> None:
        """Refuse a text, which would be taken for the list of its letters."""
        if isinstance(self.reference_domains, str):
            raise UserError(f"reference_domains: is the text {self.reference_domains!r}; write a list of domains")
        super().__post_init__()
