"""Configs of the trainers: TRL's SFTConfig and what distillation adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from daekit.data.preparation import OVERLONG
from daekit.errors import UserError
from daekit.losses import DIVERGENCES, PredictionTerms, divergence


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
        # SFTConfig turns bf16 on by default, which raises on a machine without an accelerator
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):  # type: ignore[has-type]
            self.bf16 = False
        super().__post_init__()
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

    ``loss = (ce_weight * CE + prediction_weight * T^2 * D(teacher, student)) / tokens``, in nats per kept token of the
    global batch. The defaults are the released settings of "A Teacher Is Worth A Million Instructions" (arXiv 2406.19112)
    but for its attention loss.

    Args:
        ce_weight: weight of the cross-entropy with the labels, at temperature 1.
        prediction_weight: weight of the divergence from the teacher.
        attention_weight: weight of the attention loss; only 0 is implemented.
        divergence: ``"forward_kl"`` KL(teacher || student), ``"reverse_kl"`` KL(student || teacher), ``"jsd"``,
            ``"skew_kl"`` KL(teacher || mixture) and ``"skew_reverse_kl"`` KL(student || mixture) of DistiLLM
            (arXiv 2402.03898), or ``"tv"``, half the sum of the absolute differences.
        beta: mixture weight of ``"jsd"``, between 0 and 1.
        skew_alpha: of the skew divergences, the share of the distribution on the left in the mixture; 0 <= skew_alpha < 1.
        temperature: T, divides the logits of both; the divergence is multiplied by T^2, but for ``"tv"``.
    """

    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    prediction_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})
    attention_weight: float = field(default=0.0, metadata={"help": "Weight of the attention loss (only 0 so far)."})
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Divergence from the teacher.", "choices": list(DIVERGENCES)},
    )
    beta: float = field(default=0.5, metadata={"help": "Mixture weight of the jsd divergence."})
    skew_alpha: float = field(
        default=0.1, metadata={"help": "Share of the left distribution in the mixture of skew_kl and skew_reverse_kl."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the divergence."})

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = {name: getattr(self, name) for name in ("ce_weight", "prediction_weight", "attention_weight")}
        for name, value in weights.items():
            if value < 0:
                raise UserError(f"{name}={value}: a weight of the loss cannot be negative")
        if not any(weights.values()):
            raise UserError("ce_weight, prediction_weight and attention_weight are all 0: there is nothing to learn from")
        if self.attention_weight:
            raise UserError(f"attention_weight={self.attention_weight}: the attention loss is not implemented yet; set it to 0")
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
