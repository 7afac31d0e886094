"""Scores the MoE experts of a Mixtral, and their neurons, on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.scoring import TokenRow
from daekit.students.calibration import require_enough, run_hooked
from daekit.students.slicing import require_whole


@dataclass(frozen=True)
class ExpertScores:
    """Means over all tokens, float64 on the CPU; for a token that is not sent to an expert, that expert counts as 0.

    Attributes:
        routing_LE: The weight that the router gives an expert; the weights of a layer sum to 1.
        contribution_LE: The L2 norm of what the expert adds to the MLP's output, its routing weight included.
        neurons_LEF: |activation| of each of an expert's neurons, times the routing weight.
    """

    routing_LE: Tensor
    contribution_LE: Tensor
    neurons_LEF: Tensor


def measure_experts(model: PreTrainedModel, rows: Sequence[TokenRow], *, batch_size: int = 8) -> ExpertScores:
    """Scores of a Mixtral's experts from one pass over calibration text; padding does not count.

    Args:
        rows: ``input_ids`` per row; some hundred rows are usual.

    Raises:
        UserError: The model has another architecture or quantised experts, or there are fewer tokens than neurons in an expert.
    """
    require_model_type(model, "mixtral")
    require_enough(rows, model.config.intermediate_size, "neurons of an expert")
    names = [f"model.layers.{layer}.mlp" for layer in range(model.config.num_hidden_layers)]
    observers = {name: _Experts(model.get_submodule(name)) for name in names}
    run_hooked(model, rows, observers, batch_size)
    sums = list(observers.values())
    tokens = sum(len(row["input_ids"]) for row in rows)
    return ExpertScores(
        routing_LE=torch.stack([each.routing_E for each in sums]) / tokens,
        contribution_LE=torch.stack([each.contribution_E for each in sums]) / tokens,
        neurons_LEF=torch.stack([each.neurons_EF for each in sums]) / tokens,
    )


def require_model_type(model: PreTrainedModel, model_type: str) -> None:
    """Raise UserError unless this is a plain, unquantised model of an architecture."""
    require_whole(model)
    if model.config.model_type != model_type:
        raise UserError(f"model_type {model.config.model_type!r}: this works with {model_type} models only")


class _Experts:
    """Sums over tokens for the MLP of one layer, whose router and experts are run once more on its input."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        experts, _, neurons = block.experts.down_proj.shape  # type: ignore[union-attr, misc]
        self.routing_E = torch.zeros(experts, dtype=torch.float64)
        self.contribution_E = torch.zeros(experts, dtype=torch.float64)
        self.neurons_EF = torch.zeros(experts, neurons, dtype=torch.float64)

    def __call__(self, input_BTH: Tensor, _: Tensor, real_BT: Tensor) -> None:
        hidden_NH = input_BTH[real_BT]
        experts = self.block.experts
        _, weight_NK, index_NK = self.block.gate(hidden_NH)  # type: ignore[operator]
        for expert in index_NK.unique().tolist():
            token_M, place_M = (index_NK == expert).nonzero(as_tuple=True)
            weight_M1 = weight_NK[token_M, place_M, None].float()
            gate_MF, up_MF = nn.functional.linear(hidden_NH[token_M], experts.gate_up_proj[expert]).chunk(2, dim=-1)  # type: ignore[union-attr, index]
            neurons_MF = experts.act_fn(gate_MF) * up_MF  # type: ignore[union-attr, operator]
            output_MH = nn.functional.linear(neurons_MF, experts.down_proj[expert])  # type: ignore[union-attr, index]
            self.routing_E[expert] += weight_M1.double().sum().cpu()
            self.contribution_E[expert] += (weight_M1 * output_MH.float()).norm(dim=-1).double().sum().cpu()
            self.neurons_EF[expert] += (weight_M1 * neurons_MF.float().abs()).double().sum(dim=0).cpu()
