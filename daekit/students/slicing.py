"""Cuts a student out of its teacher; the tables of ``families`` say which axis of which weight is cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
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
    indices = _Indices(model.config, order)
    parameters = dict(model.named_parameters())
    for name, layer, _, weight in family.weights(model.config):
        tensor = parameters[name]
        tensor.copy_(_take(tensor, [indices.of(axis, layer) for axis in weight.axes]))


def require_plain(model: PreTrainedModel) -> Family:
    """The family of a model; UserError unless its weights are exactly those of the family's table."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__}: a student is cut from a plain transformers model; merge its adapter first "
            "(merge_and_unload)"
        )
    family = family_of(model.config)
    if hasattr(model.config, "quantization_config"):
        raise UserError("a student cannot be cut from quantised weights: load the teacher in 16 bits (without quantization)")
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
    shape, student = selection.shape, copy.deepcopy(config)
    sizes = {
        "num_hidden_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
    }
    if not family_of(config).hidden_is_all_heads:
        sizes |= {"num_key_value_heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
    for name, size in sizes.items():
        setattr(student, name, size)
    layer_types = config.to_dict().get("layer_types")
    if layer_types is not None:
        student.layer_types = [layer_types[layer] for layer in selection.layers]
    student.name_or_path = ""
    setattr(student, ORIGIN, {"layers": list(selection.layers), "of": config.num_hidden_layers})
    student.validate()
    return student


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of ``config`` without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def fill(model: PreTrainedModel, tensors: Mapping[str, Tensor], like: PreTrainedModel) -> PreTrainedModel:
    """Give an empty model its weights, without a copy, and its buffers; in eval mode.

    Args:
        tensors: One tensor for every parameter.
        like: The model whose generation config and device are taken.
    """
    device = like.device
    unknown = model.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys
    assert not unknown, f"no such weights: {unknown}"
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if any(True for _ in module.buffers(recurse=False)):  # rotary embeddings: computed from the config, not stored
            rebuilt = type(module)(config=model.config).to(device)  # type: ignore[call-arg]
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, rebuilt)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not empty, f"weights without values: {empty}"
    if like.generation_config is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.eval()


@torch.no_grad()
def _cut(
    model: PreTrainedModel, selection: Selection, norm_fits: Mapping[str, NormFit], own: Callable[[Tensor], Tensor]
) -> PreTrainedModel:
    family = require_plain(model)
    require_valid(model.config, selection)
    config = student_config(model.config, selection)
    config.dtype = model.dtype
    indices = _Indices(model.config, selection)
    teacher = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {}
    for name, place, short, weight in family.weights(config):
        original = name if place is None else family.in_layer(selection.layers[place], short)
        tensor = _take(teacher[original], [indices.of(axis, place) for axis in weight.axes])
        if short in family.score_weights and indices.score_factor != 1.0:
            tensor = tensor * indices.score_factors(weight.axes[0], tensor)
        module, _, kind = original.rpartition(".")
        if module in norm_fits and kind == "weight":
            tensor = tensor * norm_fits[module].scale
        elif module in norm_fits:
            weight_H = _take(teacher[f"{module}.weight"], [selection.hidden])
            tensor = tensor + weight_H * norm_fits[module].shift
        tensors[name] = own(tensor)
    return fill(empty_model(config), tensors, like=model)


class _Indices:
    """The indices of the teacher that a layer of the student keeps, along each axis."""

    def __init__(self, teacher: PreTrainedConfig, selection: Selection) -> None:
        self.selection = selection
        self.head_dim = Shape.of(teacher).head_dim
        self.dims = kept_dims(teacher, selection.head_dim)
        self.score_factor = math.sqrt(selection.head_dim / self.head_dim)

    def of(self, axis: str, place: int | None) -> Sequence[int] | None:
        """The indices along a weight's axis in the student's layer ``place`` (None outside the layers); None for all."""
        if axis == "vocab":
            return None
        if axis == "hidden":
            return self.selection.hidden
        if axis == "dim":
            return self.dims
        assert place is not None, f"axis {axis} belongs to a layer"
        if axis == "neuron":
            return self.selection.neurons[place]
        if axis == "kv":
            return self._rows(self.selection.kv_heads[place])
        assert axis in ("query", "query_key_value"), axis
        return self._rows(self.selection.query_heads[place], parts=3 if axis == "query_key_value" else 1)

    def score_factors(self, axis: str, tensor: Tensor) -> Tensor:
        """The factor of every row of a weight that multiplies the scores; of fused projections, only the queries' rows."""
        rows = torch.full((len(tensor),), self.score_factor, dtype=tensor.dtype, device=tensor.device)
        if axis == "query_key_value":
            rows.view(-1, 3, len(self.dims))[:, 1:] = 1.0
        return rows.view(-1, *[1] * (tensor.dim() - 1))

    def _rows(self, heads: Sequence[int], parts: int = 1) -> list[int]:
        return [(head * parts + part) * self.head_dim + dim for head in heads for part in range(parts) for dim in self.dims]


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
