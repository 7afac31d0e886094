"""The objective of distillation: which losses a student is trained on, and how much of each. Stated here once.

It is a recipe's ``loss:`` and an argument of the loss functions; ``KDConfig`` of the trainers makes one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from daekit.errors import UserError, listed, nearest
from daekit.recipe.reading import Choice, Number, Spec, Text, Whole, as_plain
from daekit.recipe.tree import KeyPath
from daekit.recipe.validation import Problems, dotted

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tv"]
DIVERGENCES: tuple[str, ...] = get_args(DivergenceName)
WEIGHTS = ("ce_weight", "prediction_weight", "attention_weight", "hidden_weight")
ROLLOUT_BATCH = 64  # responses that a student writes in one batch of on-policy rows
_LAYERS = re.compile(r"uniform|origin|last_[1-9][0-9]{0,4}")


def _known_layers(written: Any) -> Any:
    choice = as_plain(written)
    if isinstance(choice, str):
        known = bool(_LAYERS.fullmatch(choice))
    else:
        known = isinstance(choice, list | tuple) and len(choice) > 0 and all(map(_is_pair, choice))
    if not known:
        raise ValueError(
            "choose uniform, origin, last_K (last_4), or pairs [[student's layer, teacher's layer], ...], counted from 0"
        )
    return choice


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(layer) is int and layer >= 0 for layer in value)


LayerChoice = Annotated[Text | tuple[tuple[Whole, Whole], ...], BeforeValidator(_known_layers)]


class Objective(Spec):
    """``loss = (ce_weight * CE + prediction_weight * T^2 * D + attention_weight * A + hidden_weight * H) / N``.

    N are the loss tokens of the global batch (see ``normalize``). CE, D and A are in nats, H has no unit. The defaults are the
    released settings of "A Teacher Is Worth A Million Instructions" (arXiv 2406.19112), but for its attention_weight of 1.
    """

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)

    ce_weight: Number = Field(default=0.0, ge=0)
    """Weight of CE, the cross-entropy with the labels, at temperature 1."""
    prediction_weight: Number = Field(default=1.0, ge=0)
    """Weight of D, the divergence of the student's next-token distribution from its teacher's."""
    attention_weight: Number = Field(default=0.0, ge=0)
    """Weight of A, KL(teacher's attention || student's), the mean over heads and layers, without temperature. It needs one
    teacher per row, whose attention is softmax attention."""
    hidden_weight: Number = Field(default=0.0, ge=0)
    """Weight of H, the distance between hidden states."""
    divergence: Annotated[DivergenceName, Choice] = "forward_kl"
    """forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); jsd; skew_kl: KL(teacher || mixture) and
    skew_reverse_kl: KL(student || mixture) of DistiLLM (arXiv 2402.03898); tv: half the sum of the absolute differences."""
    beta: Number = Field(default=0.5, gt=0, lt=1)
    """Mixture weight of jsd; its limits 0 and 1 are forward_kl and reverse_kl, scaled."""
    skew_alpha: Number = Field(default=0.1, ge=0, lt=1)
    """Share of the distribution on the left in the mixture of skew_kl and skew_reverse_kl; at 1 they would be 0."""
    temperature: Number = Field(default=1.0, gt=0)
    """T, which divides the logits of both models; D is multiplied by T^2, but for tv."""
    attention_layers: LayerChoice = "uniform"
    """Layers whose attention is compared: uniform (all of the student's, spread over the teacher's), origin (each with the
    layer that it was cut from, of a student that daekit made from this teacher), last_K (the last K of both), or pairs
    [student's layer, teacher's layer], counted from 0."""
    attention_relation_heads: Whole | None = Field(default=None, ge=1)
    """Compare attention in so many relation heads (MiniLMv2, arXiv 2012.15828); null: one head to one head."""
    hidden_loss: Annotated[Literal["cosine", "mse"], Choice] = "cosine"
    """cosine: 1 - cos; mse: mean squared difference; through a learned projection where the widths differ."""
    hidden_layers: LayerChoice = "uniform"
    """Layers whose hidden states are compared, as for attention_layers."""
    normalize: Annotated[Literal["tokens", "rows"], Choice] = "tokens"
    """tokens: the loss is a mean over the loss tokens of the global batch; rows: over its rows, of each row's own mean, so that
    a long response counts as much as a short one."""
    on_policy: Number = Field(default=0.0, ge=0, le=1)
    """Share of a step's rows whose response the student writes itself (GKD, arXiv 2306.13649); the teacher scores it."""
    max_new_tokens: Whole = Field(default=128, ge=1)
    """Tokens at most of a response that the student writes; one that is longer is cut there, without an end of turn."""
    rollout_temperature: Number = Field(default=1.0, ge=0)
    """Temperature at which the student writes, of its whole distribution; 0: the most likely token."""
    rollout_buffer: Whole = Field(default=16, ge=1)
    """Steps whose responses are written at once: faster, but by the student of up to so many steps ago less one."""

    @model_validator(mode="after")
    def _anything_to_learn(self) -> Objective:
        if self is None:  # what a file has in its place is no mapping, which is noted
            return self
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError(f"{listed(WEIGHTS)} are all 0: there is nothing to learn from")
        if self.on_policy and not any(getattr(self, name) for name in WEIGHTS[1:]):
            raise ValueError(
                f"on_policy={self.on_policy:g}: a response that the student wrote has no label to learn from, and there is "
                "only ce_weight. Set prediction_weight, or on_policy to 0"
            )
        if self.on_policy == 1 and self.ce_weight:
            raise ValueError(
                f"ce_weight={self.ce_weight:g} counts on rows with labels, and on_policy=1 leaves none: set it to 0"
            )
        if self.normalize == "rows" and (self.attention_weight or self.hidden_weight):
            raise ValueError(
                "normalize=rows is for ce_weight and prediction_weight: attention_weight and hidden_weight are means over "
                "tokens. Set them to 0, or normalize to tokens"
            )
        return self

    def problems(self) -> Problems:
        """Settings that would do nothing."""
        for key in self.changed("max_new_tokens", "rollout_temperature", "rollout_buffer") if not self.on_policy else ():
            yield key, "belongs to on_policy, which is 0: it would do nothing"
        for key, divergences in {"beta": ("jsd",), "skew_alpha": ("skew_kl", "skew_reverse_kl")}.items():
            if self.divergence not in divergences and self.changed(key):
                yield key, f"{key} belongs to divergence: {' or '.join(divergences)}, not to {self.divergence}"
        for kind, options in {"attention": ("layers", "relation_heads"), "hidden": ("layers", "loss")}.items():
            for key in self.changed(*(f"{kind}_{option}" for option in options if not getattr(self, f"{kind}_weight"))):
                yield key, f"belongs to {kind}_weight, which is 0: it would do nothing"

    @property
    def parameter(self) -> float:
        """The one number that the divergence depends on, if it does."""
        return self.beta if self.divergence == "jsd" else self.skew_alpha


class Selection(Spec):
    """Which checkpoint of a training is kept: of those that have not forgotten too much the one that has gained most."""

    model_config = ConfigDict(use_attribute_docstrings=True, allow_inf_nan=False)

    gain: Text = Field(min_length=1)
    """The domain whose cross-entropy on validation rows is to be lowest."""
    forgetting: dict[str, Annotated[Number, Field(ge=0)]] = Field(min_length=1)
    """Domain -> the most that the divergence from its teacher may be there, in nats per token, on validation rows; or a metric
    (`ce/general`) -> the most that it may be."""
    patience: Whole | None = Field(default=None, ge=1)
    """End the training after so many evaluations that bring nothing better; null: train to the end."""

    def unwatched(self, domains: Collection[str]) -> Iterator[tuple[KeyPath, str]]:
        """(key, message) of each domain without validation rows."""
        named: list[tuple[KeyPath, str]] = [(("gain",), self.gain or "")]
        named += [(("forgetting", name), name.rpartition("/")[2]) for name in self.forgetting or ()]
        for key, domain in named:
            if domain not in domains:
                have = f"{listed(sorted(domains))}){nearest(domain, domains)}"
                yield key, f"{domain!r} has no validation rows in this stage (there are: {have}; give it some, or name another"

    def require_domains(self, domains: Collection[str]) -> None:
        """UserError for a domain without validation rows."""
        for key, message in self.unwatched(domains):
            raise UserError(f"select.{dotted(key)}: {message}")
