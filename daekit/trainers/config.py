"""Configs of the trainers: TRL's SFTConfig and what distillation adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from daekit.data.preparation import OVERLONG
from daekit.errors import UserError
from daekit.losses import DIVERGENCES, PredictionTerms, divergence
from daekit.trainers.engines import connect, refuse_launch


@dataclass
class DomainSFTConfig(SFTConfig):
    """SFTConfig for rows that have a domain.

    Options that would change the objective without a word are refused: label smoothing, NEFTune, another ``loss_type``,
    ``average_tokens_across_devices=False``, ``truncation_mode="keep_end"``. The load-balancing loss of a mixture-of-experts
    student is 0 unless set.

    Args:
        overlong: what becomes of rows longer than ``max_length`` tokens: ``"error"``, ``"truncate"`` or ``"drop"``; what is
            cut or dropped is counted per domain.
    """

    overlong: str = field(
        default="error",
        metadata={"help": "Rows longer than max_length: 'error', 'truncate' or 'drop'.", "choices": list(OVERLONG)},
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss of a mixture-of-experts student (0: none)."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log. Off: they are shown as they are."}
    )

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
        self._refuse_changed_objectives()
        if self.overlong not in OVERLONG:
            raise UserError(f"overlong: {self.overlong!r} is unknown; choose one of {', '.join(OVERLONG)}")

    def _refuse_changed_objectives(self) -> None:
        refused = {
            "label_smoothing_factor": (self.label_smoothing_factor != 0, "it would smooth labels that the loss does not use"),
            "loss_type": (self.loss_type != "nll", "the loss is set by ce_weight, prediction_weight and divergence"),
            "neftune_noise_alpha": (self.neftune_noise_alpha is not None, "the student would be trained on noisy embeddings"),
            "average_tokens_across_devices": (
                not self.average_tokens_across_devices,
                "every token must count the same on every device",
            ),
            "fp16": (self.fp16, "the loss has its gradients before the GradScaler scales them: they would underflow; use bf16"),
            "truncation_mode": (self.truncation_mode != "keep_start", "rows are cut at their end, and counted when they are"),
        }
        for name, (given, reason) in refused.items():
            if given:
                raise UserError(f"{name}={getattr(self, name)!r} is not supported: {reason}. Leave it at its default.")

    def terms(self) -> PredictionTerms:
        """The terms of the loss: cross-entropy alone."""
        return PredictionTerms(ce_weight=1.0, prediction_weight=0.0)


@dataclass
class KDConfig(DomainSFTConfig):
    """DomainSFTConfig with the weights of the distillation loss.

    ``loss = (ce_weight * CE + prediction_weight * T^2 * D(teacher, student) + attention_weight * A + hidden_weight * H) / N``
    with N the kept tokens of the global batch; CE, D and A in nats, H without unit. A is KL(teacher's attention || student's),
    the mean over heads and layers, without T. The defaults are the released settings of "A Teacher Is Worth A Million
    Instructions" (arXiv 2406.19112) but for attention_weight, which is 1 there.

    Args:
        ce_weight: weight of the cross-entropy with the labels, at temperature 1.
        prediction_weight: weight of the divergence from the teacher.
        attention_weight: weight of the attention loss; needs one teacher per row, whose attention is softmax attention.
        divergence: ``"forward_kl"`` KL(teacher || student), ``"reverse_kl"`` KL(student || teacher), ``"jsd"``,
            ``"skew_kl"`` KL(teacher || mixture) and ``"skew_reverse_kl"`` KL(student || mixture) of DistiLLM
            (arXiv 2402.03898), or ``"tv"``, half the sum of the absolute differences.
        beta: mixture weight of ``"jsd"``, between 0 and 1.
        skew_alpha: of the skew divergences, the share of the distribution on the left in the mixture; 0 <= skew_alpha < 1.
        temperature: T, divides the logits of both; the divergence is multiplied by T^2, but for ``"tv"``.
        attention_layers: which layers are compared: ``"uniform"`` (all of the student's, spread over the teacher's),
            ``"last_K"`` (the last K of both), or pairs of (student's layer, teacher's layer), counted from 0.
        attention_relation_heads: compare in so many relation heads (MiniLMv2) instead of one head to one head.
        hidden_weight: weight of the hidden-state loss.
        hidden_loss: ``"cosine"`` 1 - cos, or ``"mse"`` mean squared difference; through a learned projection where the widths
            of student and teacher differ.
        hidden_layers: as ``attention_layers``.
    """

    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    prediction_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})
    attention_weight: float = field(default=0.0, metadata={"help": "Weight of the attention loss."})
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence from the teacher.", "choices": list(DIVERGENCES)},
    )
    beta: float = field(default=0.5, metadata={"help": "Mixture weight of the jsd divergence."})
    skew_alpha: float = field(
        default=0.1, metadata={"help": "Share of the left distribution in the mixture of skew_kl and skew_reverse_kl."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the divergence."})
    attention_layers: str = field(  # or pairs; HfArgumentParser can read neither Any nor a union
        default="uniform", metadata={"help": "Layers whose attention is compared: 'uniform', 'last_K', or pairs."}
    )
    attention_relation_heads: int | None = field(
        default=None, metadata={"help": "Compare attention in so many relation heads (default: one to one)."}
    )
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state loss."})
    hidden_loss: str = field(default="cosine", metadata={"help": "Hidden-state loss.", "choices": ["cosine", "mse"]})
    hidden_layers: str = field(
        default="uniform", metadata={"help": "Layers whose hidden states are compared: 'uniform', 'last_K', or pairs."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("ce_weight", "prediction_weight", "attention_weight", "hidden_weight")
        weights = {name: getattr(self, name) for name in names}
        for name, value in weights.items():
            if value < 0:
                raise UserError(f"{name}={value}: a weight of the loss cannot be negative")
        if not any(weights.values()):
            raise UserError(f"{', '.join(names)} are all 0: there is nothing to learn from")
        if self.hidden_loss not in ("cosine", "mse"):
            raise UserError(f"hidden_loss={self.hidden_loss!r} is unknown; choose cosine or mse")
        if self.attention_relation_heads is not None and self.attention_relation_heads < 1:
            raise UserError(f"attention_relation_heads={self.attention_relation_heads}: at least 1 is needed")
        selective = self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("selective")
        if self.attention_weight and selective:
            raise UserError(
                "gradient_checkpointing_kwargs={'selective': True}: it does not let the second run of a layer compute "
                "the gradient of the attention loss. Leave it out, or set attention_weight to 0."
            )
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} is not positive")
        divergence(self.divergence, self.terms().parameter)

    def terms(self) -> PredictionTerms:
        """The terms of the loss."""
        return PredictionTerms(
            self.ce_weight, self.prediction_weight, self.divergence, self.beta, self.skew_alpha, self.temperature
        )


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
