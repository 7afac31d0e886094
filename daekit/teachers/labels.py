"""The labels as a teacher: a domain whose rows follow their own tokens, beside domains that follow models."""

from __future__ import annotations

from typing import Any

import torch

from daekit.errors import UserError
from daekit.protocol import Batch, FeatureSpec, TeacherOutput, TopK
from daekit.recipe.objective import Objective


class LabelTeacher:
    """Gives the label of each loss position the probability 1, so that forward KL is the cross-entropy with the labels.

    ``RoutedTeacher({"shop": LabelTeacher(), "general": reference})`` is what one does for a domain that has rows and no
    expert. It serves forward KL at temperature 1: a reverse divergence from one certain token is infinite, and at another
    temperature the loss would not be the cross-entropy.
    """

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """One output for all loss positions: one token of probability 1, and a tail of probability 0."""
        labels_N = batch.labels_N
        certain_N1 = torch.zeros(labels_N.numel(), 1, device=labels_N.device)
        nothing_N = torch.full((labels_N.numel(),), -torch.inf, device=labels_N.device)
        positions = torch.arange(labels_N.numel(), device=labels_N.device)
        return [TeacherOutput(positions, (), top_k=TopK(labels_N[:, None], certain_N1, 1.0, nothing_N))]

    def require_served(self, objective: Objective, tokenizer: Any = None, rows: Any = ()) -> None:
        """See ``DemandingTeacher``.

        Raises:
            UserError: another divergence or temperature; features of layers.
        """
        if objective.on_policy:
            raise UserError(
                f"on_policy={objective.on_policy:g}: what the student writes has no labels that it could follow. Give a "
                "teacher, or set on_policy to 0"
            )
        if objective.attention_weight or objective.hidden_weight:
            raise UserError("attention_weight, hidden_weight: labels have no layers to compare with. Set both to 0.")
        if objective.divergence != "forward_kl" or objective.temperature != 1.0:
            raise UserError(
                f"divergence: {objective.divergence} at temperature {objective.temperature} with labels as a teacher; only "
                "forward_kl at temperature 1 is the cross-entropy with them. Use these, or train that domain by an sft stage"
            )

    def identity(self) -> dict[str, object]:
        """The kind: labels belong to the rows."""
        return {"kind": "labels"}

    def to(self, device: torch.device) -> LabelTeacher:
        """Nothing to move."""
        return self
