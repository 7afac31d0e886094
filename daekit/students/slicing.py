"""Cuts a student out of its teacher; the tables of ``families`` say which axis of which weight is cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from daekit.errors import UserError
from daekit.models.features import ORIGIN
from daekit.students.families import Family, family_of
from daekit.students.selection import Selection, require_valid
from daekit.students.shapes import Shape, rotated


@dataclass(frozen=True)
class NormFit:
    """The result of ``fit_norms`` for one norm: before weight and bias, the teacher's outputs are ``scale`` times those of the
    student, plus ``shift``."""

    scale: float
    shift: float = 0.0


def slice_model(
    model: PreTrainedModel, selection: Selection, norm_fits: Mapping[str, NormFit] | None = None
) -> PreTrainedModel:
    """A student of the same family that holds the selected part of ``model``: its dtype, its device, storage of its own.

    A narrower head_dim: the rows of the queries (or the weight of their norm) are scaled, so that the scores keep their size
    although the model divides them by the root of another head_dim.

    Args:
        model: The teacher, a causal language model in 16 or 32 bits without adapters.
        norm_fits: The result of ``fit_norms``; norms over fewer channels are scaled to what they gave over all of them.

    Raises:
        UserError: The family is not supported, the selection is not possible, or the weights are quantised or adapted.
    """
    return _cut(model, selection, norm_fits or {}, lambda tensor: tensor.clone())


def view_model(model: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    """As ``slice_model``, but frozen, and with views of the teacher's weights wherever strides can express what is kept.

    If ``sort_teacher`` sorted the teacher, a selection of the first units needs no copies, unless it drops query heads within
    groups or dimensions within heads: then the attention's projections are copies.
    """
    return _cut(model, selection, {}, lambda tensor: tensor).requires_grad_(False)


@torch.no_grad()
def permute_(model: PreTrainedModel, order: Selection) -> None:
    """Reorder channels, neurons and heads of ``model`` in place; one weight at a time is copied.

    Args:
        order: A selection that keeps all units.
    """
    family = require_plain(model)
    require_valid(model.config, order)
    if order.shape != Shape.of(model.config):
        raise UserError("an order of a teacher's units must keep all of them")
    kept = _kept_indices(model.config, order)
    parameters = dict(model.named_parameters())
    for name, layer, _, axes in family.weights(model.config):
        tensor = parameters[name]
        tensor.copy_(_take(tensor, [kept[layer or 0][axis] for axis in axes]))


def require_whole(model: PreTrainedModel) -> None:
    """UserError unless this is a transformers model without adapters whose weights are as they were trained."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__}: not a plain transformers model, as a student is made of; merge its adapter first "
            "(merge_and_unload)"
        )
    if hasattr(model.config, "quantization_config"):
        raise UserError("a student cannot be made of quantised weights: load the teacher in 16 bits (without quantization)")


def require_plain(model: PreTrainedModel) -> Family:
    """The family of a model; UserError unless its weights are exactly those of the family's table."""
    require_whole(model)
    family = family_of(model.config)
    expected = {name for name, *_ in family.weights(model.config)}
    found = {name for name, _ in model.named_parameters()}
    if expected != found:
        raise UserError(
            f"{type(model).__name__}: its weights are not those of a {model.config.model_type} causal language model: "
            f"{', '.join(sorted(expected ^ found)[:5])}; a student cannot be cut from it"
        )
    return family


def student_config(config: PreTrainedConfig, selection: Selection) -> PreTrainedConfig:
    """The config of the student: the teacher's, with other sizes and lists per layer, and which of its layers these are."""
    student, follow_from_others = copy.deepcopy(config), family_of(config).hidden_is_all_heads
    for name, size in vars(selection.shape).items():
        if not (follow_from_others and name in ("num_key_value_heads", "head_dim")):
            setattr(student, name, size)
    layer_types = config.to_dict().get("layer_types")
    if layer_types is not None:
        student.layer_types = [layer_types[layer] for layer in selection.layers]
    student.name_or_path = ""
    setattr(student, ORIGIN, {"layers": list(selection.layers), "of": config.num_hidden_layers})
    student.validate()
    return student


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of ``config`` whose parameters have no storage; its buffers are computed from the config."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def fill(model: PreTrainedModel, tensors: Mapping[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """Give an empty model its weights, without a copy; in eval mode.

    Args:
        tensors: One tensor for every parameter.
        like: The model whose generation config and device are taken.
    """
    unknown = model.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys
    assert not unknown, f"no such weights: {unknown}"
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not empty, f"weights without values: {empty}"
    if like.generation_config is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).eval()  # type: ignore[arg-type]


@torch.no_grad()
def _cut(
    model: PreTrainedModel, selection: Selection, norm_fits: Mapping[str, NormFit], own: Callable[[Tensor], Tensor]
) -> PreTrainedModel:
    family = require_plain(model)
    require_valid(model.config, selection)
    config = student_config(model.config, selection)
    config.dtype = model.dtype
    kept = _kept_indices(model.config, selection)
    factor = math.sqrt(selection.head_dim / Shape.of(model.config).head_dim)
    teacher = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {}
    for name, place, short, axes in family.weights(config):
        original = name if place is None else family.in_layer(selection.layers[place], short)
        tensor = _take(teacher[original], [kept[place or 0][axis] for axis in axes])
        if short.startswith(f"{family.scores}.") and factor != 1.0:
            tensor = tensor * _score_factors(tensor, factor, selection.head_dim, fused=axes[0] == "query_key_value")
        module, _, kind = original.rpartition(".")
        if module in norm_fits and kind == "weight":
            tensor = tensor * norm_fits[module].scale
        elif module in norm_fits:
            weight_H = _take(teacher[f"{module}.weight"], [selection.hidden])
            tensor = tensor + weight_H * norm_fits[module].shift
        tensors[name] = own(tensor)
    return fill(empty_model(config), tensors, like=model)


def _kept_indices(teacher: PreTrainedConfig, selection: Selection) -> list[dict[str, Sequence[int] | None]]:
    """Axis -> the indices of the teacher that the student keeps along it (None: all), for every layer of the student.

    Those of the axes of weights outside the layers are the same in each.
    """
    head_dim, dims = Shape.of(teacher).head_dim, kept_dims(teacher, selection.head_dim)

    def rows(heads: Sequence[int], parts: int = 1) -> list[int]:
        return [(head * parts + part) * head_dim + dim for head in heads for part in range(parts) for dim in dims]

    everywhere = {"vocab": None, "hidden": selection.hidden, "dim": dims}
    layers = zip(selection.neurons, selection.kv_heads, selection.query_heads, strict=True)
    return [
        {**everywhere, "neuron": neurons, "kv": rows(kv), "query": rows(queries), "query_key_value": rows(queries, parts=3)}
        for neurons, kv, queries in layers
    ]


def _score_factors(tensor: Tensor, factor: float, head_dim: int, fused: bool) -> Tensor:
    """The factor of every row of a weight that multiplies the scores; of fused projections, only of the queries' rows."""
    rows = torch.full((len(tensor),), factor, dtype=tensor.dtype, device=tensor.device)
    if fused:
        rows.view(-1, 3, head_dim)[:, 1:] = 1.0
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def kept_dims(teacher: PreTrainedConfig, head_dim: int) -> list[int]:
    """The dimensions of a teacher's head that a head of ``head_dim`` keeps: every k-th pair of those that RoPE rotates (which
    are i and i + half), every k-th of the others."""
    whole = Shape.of(teacher).head_dim
    step, turned = whole // head_dim, rotated(teacher, whole)
    pairs = range(0, turned // 2, step)
    return [*pairs, *(pair + turned // 2 for pair in pairs), *range(turned, whole, step)]


def _take(tensor: Tensor, indices: Sequence[Sequence[int] | None]) -> Tensor:
    """The part of a tensor at the indices of each dimension: a view where they are consecutive."""
    for dim, index in enumerate(indices):
        if index is None:
            continue
        start, length = index[0], len(index)
        if list(index) == list(range(start, start + length)):
            tensor = tensor.narrow(dim, start, length)
        else:
            tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return tensor
