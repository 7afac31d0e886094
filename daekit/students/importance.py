"""Scores each layer, channel, neuron and head of a teacher on calibration text, and chooses the units with the best scores.

The scores are those of NVIDIA's Minitron (Model-Optimizer, mcore_minitron.py): of an activation a, the mean of |a| over the
tokens of a sequence, and of these means the root of the sum of squares over the sequences;

    hidden    outputs of the two norms of every layer, summed over the norms
    neurons   inputs of the MLP's output projection, per layer
    queries   inputs of the attention's output projection, per layer: the norm over a head's dimensions
    layers    1 - cos(input, output) of the layer, mean over tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from daekit.models.scoring import TokenRow
from daekit.students.calibration import require_enough, run_hooked
from daekit.students.families import NORMS
from daekit.students.selection import Selection
from daekit.students.shapes import Shape, require_possible
from daekit.students.slicing import permute_, require_plain, student_config


@dataclass(frozen=True)
class Importance:
    """The scores of a teacher's units, float64 on the CPU; only their order matters, and of equal scores the first wins.

    Attributes:
        layers_L: The scores of the layers.
        hidden_H: The scores of the channels.
        neurons_LF: The scores of the neurons of every layer.
        queries_LA: The scores of the query heads of every layer; a key/value head has the sum of its query heads' scores.
    """

    layers_L: Tensor
    hidden_H: Tensor
    neurons_LF: Tensor
    queries_LA: Tensor

    @property
    def uniform(self) -> Importance:
        """Scores that are the same in every layer: the sum over the layers, each of which counts alike."""

        def together(scores_LU: Tensor) -> Tensor:
            share_LU = scores_LU / scores_LU.abs().sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            return share_LU.sum(dim=0).expand_as(scores_LU)

        return replace(self, neurons_LF=together(self.neurons_LF), queries_LA=together(self.queries_LA))


def measure_importance(model: PreTrainedModel, rows: Sequence[TokenRow], *, batch_size: int = 8) -> Importance:
    """Scores from one pass over calibration text; padding does not count, nothing of a batch is kept but sums per unit.

    Args:
        rows: ``input_ids`` per row; some hundred rows are usual.

    Raises:
        UserError: The family is not supported, or there are fewer tokens than units to rank.
    """
    family = require_plain(model)
    shape = Shape.of(model.config)
    require_enough(rows, max(shape.hidden_size, shape.intermediate_size), "channels or neurons")
    layers = range(shape.num_hidden_layers)
    norms = {family.in_layer(layer, norm): _MeanSquares(of_output=True) for layer in layers for norm in NORMS}
    heads = {family.in_layer(layer, family.attention_output): _MeanSquares() for layer in layers}
    neurons = {family.in_layer(layer, family.mlp_output): _MeanSquares() for layer in layers}
    angles = {f"{family.backbone}.layers.{layer}": _Angles() for layer in layers}
    run_hooked(model, rows, {**norms, **heads, **neurons, **angles}, batch_size)
    norms_XH, heads_LU, neurons_LF = (
        torch.stack([each.total_U.sqrt() for each in sums.values()]) for sums in (norms, heads, neurons)
    )
    return Importance(
        layers_L=torch.stack([angle.mean() for angle in angles.values()]),
        hidden_H=norms_XH.sum(dim=0),
        neurons_LF=neurons_LF,
        queries_LA=heads_LU.view(len(layers), shape.num_attention_heads, -1).norm(dim=-1),
    )


def first_n(config: PreTrainedConfig) -> Importance:
    """Scores that fall from the first unit to the last: a baseline."""
    return _scored(config, lambda *size: -torch.arange(size[-1], dtype=torch.float64).expand(size))


def at_random(config: PreTrainedConfig, seed: int) -> Importance:
    """Random scores: a baseline."""
    generator = torch.Generator().manual_seed(seed)
    return _scored(config, lambda *size: torch.rand(size, dtype=torch.float64, generator=generator))


def config_of_shape(config: PreTrainedConfig, shape: Shape) -> PreTrainedConfig:
    """The config of a student of this shape, whichever units of its teacher it will keep.

    Raises:
        UserError: The shape cannot be cut out of this teacher.
    """
    return student_config(config, choose(config, first_n(config), shape))


def choose(config: PreTrainedConfig, importance: Importance, shape: Shape) -> Selection:
    """The units of a teacher with the best scores, the best first (layers in the teacher's order).

    Raises:
        UserError: The shape cannot be cut out of this teacher.
    """
    require_possible(config, shape)
    group = Shape.of(config).queries_per_group
    layers = sorted(_best(importance.layers_L, shape.num_hidden_layers))
    kv_heads, query_heads = [], []
    for layer in layers:
        queries_GR = importance.queries_LA[layer].view(-1, group)
        kv_heads.append(_best(queries_GR.sum(dim=1), shape.num_key_value_heads))
        query_heads.append(
            tuple(kv * group + query for kv in kv_heads[-1] for query in _best(queries_GR[kv], shape.queries_per_group))
        )
    return Selection(
        layers=tuple(layers),
        hidden=_best(importance.hidden_H, shape.hidden_size),
        neurons=tuple(_best(importance.neurons_LF[layer], shape.intermediate_size) for layer in layers),
        kv_heads=tuple(kv_heads),
        query_heads=tuple(query_heads),
        head_dim=shape.head_dim,
    )


def sort_teacher(model: PreTrainedModel, importance: Importance) -> None:
    """Reorder channels, neurons and heads in place, the best scores first.

    The best sub-networks are then the first units of everything, and views. What the model computes
    changes by rounding only; layers keep their places. One weight at a time is copied.
    """
    permute_(model, choose(model.config, importance, Shape.of(model.config)))


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return tuple(scores.sort(descending=True, stable=True).indices[:count].tolist())


def _scored(config: PreTrainedConfig, scores: Callable[..., Tensor]) -> Importance:
    shape = Shape.of(config)
    layers = shape.num_hidden_layers
    return Importance(
        layers_L=scores(layers),
        hidden_H=scores(shape.hidden_size),
        neurons_LF=scores(layers, shape.intermediate_size),
        queries_LA=scores(layers, shape.num_attention_heads),
    )


class _MeanSquares:
    """Per unit of a module's input (or output) the sum over sequences of (mean over tokens of |a|) squared."""

    def __init__(self, of_output: bool = False) -> None:
        self.of_output = of_output
        self.total_U = torch.zeros((), dtype=torch.float64)

    def __call__(self, input_BTU: Tensor, output_BTU: Tensor, real_BT: Tensor) -> None:
        size_BTU = (output_BTU if self.of_output else input_BTU).abs().float() * real_BT[..., None]
        mean_BU = size_BTU.sum(dim=1) / real_BT.sum(dim=1, keepdim=True)
        self.total_U = self.total_U + mean_BU.double().square().sum(dim=0).cpu()


class _Angles:
    """Mean over tokens of 1 - cos(input, output) of a layer."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def __call__(self, input_BTH: Tensor, output_BTH: Tensor, real_BT: Tensor) -> None:
        cosine_BT = torch.cosine_similarity(input_BTH.float(), output_BTH.float(), dim=-1)
        self.total += float((1 - cosine_BT)[real_BT].double().sum())
        self.tokens += int(real_BT.sum())

    def mean(self) -> Tensor:
        return torch.tensor(self.total / self.tokens, dtype=torch.float64)
