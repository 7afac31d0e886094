"""Features of a model: queries and keys of its attention, hidden states behind its layers.

``FeatureSpec`` says which features a student is compared by, ``layers_of`` which layers of one teacher that means, and
``states_and_features`` runs a frozen model once and keeps exactly those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.models.attention_capture import AttentionCall, capture_attention, capturing_function, require_row_mask
from daekit.models.backbone import base_of, can_run, decoder_layers, frozen_forward, hidden_at_loss_positions
from daekit.models.heads import compute_dtype
from daekit.protocol import (
    AttentionLayer,
    Batch,
    FeatureLayers,
    Features,
    FeatureSpec,
    FeatureTeacher,
    LayerChoice,
    Teacher,
)
from daekit.recipe.objective import Objective

# in the config of a student made from its teacher: {"layers": those that its own were, "of": how many the teacher has}
ORIGIN = "daekit_origin"
_LAST = re.compile(r"^last_([1-9]\d*)$")
# what configs call layers with softmax attention; "hybrid": Zamba's, a state-space layer with attention in it
_SOFTMAX_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid")
# families whose attention weights are something else, and whose configs do not say so
_NO_PLAIN_SOFTMAX = {"gpt_oss": "attention sinks", "bloom": "position biases (ALiBi)", "mpt": "position biases (ALiBi)"}


def feature_spec(objective: Objective, student: PreTrainedConfig) -> FeatureSpec | None:
    """What an objective compares a student with besides distributions; None if nothing."""
    if not (objective.attention_weight or objective.hidden_weight):
        return None
    return FeatureSpec(
        student.get_text_config(),
        attention=objective.attention_layers if objective.attention_weight else None,
        hidden=objective.hidden_layers if objective.hidden_weight else None,
        relation_heads=objective.attention_relation_heads,
    )


def layers_of(spec: FeatureSpec, teacher: PreTrainedConfig) -> FeatureLayers:
    """The layers of a teacher that a spec means.

    Raises:
        UserError: layers that do not exist; ``origin`` of a student that was not cut from this teacher; other numbers of heads
            without relation heads; an attention implementation that cannot be captured, if one has been chosen.
    """
    ours, theirs = spec.student, teacher.get_text_config()
    depths = ours.num_hidden_layers, theirs.num_hidden_layers
    layers = [_origin(ours, theirs) if choice == "origin" else choice for choice in (spec.attention, spec.hidden)]
    attention: Mapping[int, int] = {}
    if layers[0] is not None:
        for who, config in (("teacher", theirs), ("student", ours)):
            _require_softmax(who, config)
            if spec.relation_heads is not None:
                require_divisible(who, config, spec.relation_heads)
        if spec.relation_heads is None:
            require_equal_heads(ours.num_attention_heads, theirs.num_attention_heads)
        if isinstance(layers[0], str):
            mine, yours = softmax_layers(ours), softmax_layers(theirs)
            pairs = match_layers(layers[0], len(mine), len(yours))
            attention = {mine[student]: yours[teacher] for student, teacher in pairs.items()}
        else:
            attention = match_layers(layers[0], *depths)
    hidden = match_layers(layers[1], *depths) if layers[1] is not None else {}
    return FeatureLayers(attention, hidden, theirs.hidden_size)


def _origin(student: PreTrainedConfig, teacher: PreTrainedConfig) -> LayerChoice:
    """The pairs of a student's layers and those that they were cut from; of a teacher with the same origin the same layers."""
    origin, depth = getattr(student, ORIGIN, None), teacher.num_hidden_layers
    remedy = "choose uniform, last_K (last_4), or pairs of a student's and a teacher's layer"
    if origin is None:
        raise UserError(
            f"layers origin: the student was not made from a teacher (its config has no {ORIGIN}; old ones have none); {remedy}"
        )
    if getattr(teacher, ORIGIN, None) == origin and student.num_hidden_layers == depth:
        return tuple((layer, layer) for layer in range(depth))
    if (len(origin["layers"]), origin["of"]) != (student.num_hidden_layers, depth):
        raise UserError(
            f"layers origin: the student was cut to {len(origin['layers'])} of its teacher's {origin['of']} layers, but has "
            f"{student.num_hidden_layers}, and is compared with a teacher of {depth}; {remedy}"
        )
    return tuple(enumerate(origin["layers"]))


def softmax_layers(config: PreTrainedConfig) -> list[int]:
    """The layers of a text model that have softmax attention; of a hybrid not its linear, convolution or state-space layers."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    every = range(config.num_hidden_layers)
    return list(every) if kinds is None else [layer for layer in every if kinds[layer] in _SOFTMAX_KINDS]


def _require_softmax(who: str, config: PreTrainedConfig) -> None:
    """Attention weights must be the causal softmax of scaled scores, otherwise UserError; what the config says of it."""
    found = _NO_PLAIN_SOFTMAX.get(config.model_type)
    if getattr(config, "attn_logit_softcapping", None):
        found = "soft-capped scores (attn_logit_softcapping)"
    elif getattr(config, "alibi", False):
        found = "position biases (ALiBi)"
    elif not softmax_layers(config) or not hasattr(config, "num_attention_heads"):
        found = "no softmax layer"
    if found:
        raise UserError(
            f"{who} ({config.model_type}): its attention has {found}, so its weights are not the causal softmax of scaled "
            "scores that the attention loss compares, whatever attn_implementation. Set attention_weight to 0 for this model."
        )
    if config._attn_implementation is not None:  # of a model that is loaded, not of a config alone
        capturing_function(config._attn_implementation, f"{who} ({config.model_type})")


def match_layers(choice: LayerChoice, student: int, teacher: int) -> dict[int, int]:
    """Student's layer -> teacher's layer, counted from 0.

    Args:
        choice: ``uniform``: every layer of the student, spread evenly, the last one on the last; ``last_K``: the last K of
            both; or pairs (student's layer, teacher's layer).
        student, teacher: Numbers of their layers.

    Raises:
        UserError: an unknown choice, a layer that does not exist, or one of the student's that is named twice.
    """
    last = _LAST.match(choice) if isinstance(choice, str) else None
    if choice == "uniform":
        pairs = [(layer, -(-(layer + 1) * teacher // student) - 1) for layer in range(student)]
    elif last is not None:
        pairs = [(student - back, teacher - back) for back in range(int(last.group(1)), 0, -1)]
    elif isinstance(choice, str) or not choice:
        raise UserError(f"layers {choice!r}: choose uniform, origin, last_K (last_4), or pairs [student's, teacher's]")
    else:
        pairs = [(int(ours), int(theirs)) for ours, theirs in choice]
    for ours, theirs in pairs:
        if not (0 <= ours < student and 0 <= theirs < teacher):
            raise UserError(
                f"layers {choice!r}: student's layer {ours} on teacher's layer {theirs} does not exist; the student has "
                f"{student} layers, the teacher {teacher}, counted from 0"
            )
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"layers {choice!r}: a layer of the student is named twice; it can follow one layer of its teacher")
    return dict(pairs)


def require_equal_heads(ours: int, theirs: int) -> None:
    """One-to-one comparison needs as many heads in the student as in its teacher, otherwise UserError."""
    if ours != theirs:
        raise UserError(
            f"the student has {ours} attention heads, its teacher {theirs}: they cannot be compared one to one. Set "
            "attention_relation_heads to a number that divides the width of all heads of both, or attention_weight to 0."
        )


def require_divisible(who: str, config: PreTrainedConfig, relation_heads: int) -> None:
    """The width of all heads together must split into relation heads, otherwise UserError."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)  # as transformers reads it
    if width % relation_heads:
        raise UserError(
            f"attention_relation_heads={relation_heads}: does not divide the width of all heads of the {who}, {width} "
            f"({heads} heads); choose a number that divides it in student and teacher"
        )


def require_features(teacher: Teacher) -> FeatureTeacher:
    """The teacher itself, if it hands out features, otherwise UserError."""
    if isinstance(teacher, FeatureTeacher):
        return teacher
    raise UserError(
        f"{type(teacher).__name__} hands out no features (it has no method feature_layers), as attention_weight and "
        "hidden_weight need. Set them to 0, or give its model to a ModelTeacher."
    )


def states_and_features(model: nn.Module, batch: Batch, capture: FeatureSpec | None) -> tuple[Tensor, Features | None]:
    """``[N, H]`` last hidden states at the loss positions, and the features that ``capture`` asks for.

    Memory: N x A x D + B x T x G x D values per captured layer of attention, N x H per captured layer of hidden states.
    """
    if capture is None:
        return hidden_at_loss_positions(model, batch), None
    return _captured(model, batch, layers_of(capture, base_of(model).config))


def require_capturable(model: nn.Module, layers: FeatureLayers) -> None:
    """Run a model on a few tokens and capture the features of ``layers``, so that what cannot be is said before the first step.

    Raises:
        UserError: attention that is not the plain softmax, layers that do not run, or hand on several streams.
    """
    if not can_run(model):
        return
    ids_1T = torch.arange(8, device=base_of(model).device)[None]
    batch = Batch({"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T)}, ids_1T, torch.zeros_like(ids_1T), ("",))
    with frozen_forward(model):
        _captured(model, batch, layers)


def _captured(model: nn.Module, batch: Batch, layers: FeatureLayers) -> tuple[Tensor, Features]:
    attention: dict[int, AttentionLayer] = {}  # by the teacher's layers
    hidden: dict[int, Tensor] = {}
    checked: set[tuple[int, int | None]] = set()

    def keep_attention(call: AttentionCall) -> None:
        if call.layer in layers.attention.values():
            attention[call.layer] = attention_at_loss_positions(call, batch, checked)

    def keep_hidden(layer: int, hidden_BTH: Tensor) -> None:
        hidden[layer] = batch.at_loss_positions(hidden_BTH)

    with ExitStack() as stack:
        if layers.attention:
            stack.enter_context(capture_attention(model, keep_attention))
        stack.enter_context(capture_hidden(model, layers.hidden.values(), keep_hidden))
        hidden_NH = hidden_at_loss_positions(model, batch)
    require_attention(layers.attention.values(), attention)
    require_hidden(layers.hidden.values(), hidden)
    return hidden_NH, Features(
        batch.layout,
        {ours: attention[theirs] for ours, theirs in layers.attention.items()},
        {ours: hidden[theirs] for ours, theirs in layers.hidden.items()},
    )


def attention_at_loss_positions(call: AttentionCall, batch: Batch, checked: set[tuple[int, int | None]]) -> AttentionLayer:
    """The call's queries at the loss positions, and its keys; its mask is checked once, as layers share it.

    Under autocast both are rounded as the model's own attention rounds them (rotary embedding leaves them in float32).
    ``checked`` holds the masks (by identity) and windows that have been checked in this forward.
    """
    kind = (id(call.mask), call.window)
    if kind not in checked:
        require_row_mask(call, batch)
        checked.add(kind)
    dtype = compute_dtype(call.query_BATD)
    query_NAD = batch.at_loss_positions(call.query_BATD.transpose(1, 2)).to(dtype)
    return AttentionLayer(query_NAD, call.key_BGTD.to(dtype), call.scaling, call.window)


def require_attention(wanted: Iterable[int], captured: Mapping[int, Any]) -> None:
    """Every wanted layer must have called its attention function, otherwise UserError."""
    missing = sorted(set(wanted) - set(captured))
    if missing:
        raise UserError(
            f"the attention of layers {missing} cannot be captured: they never called transformers' attention function (linear "
            "attention, a state-space layer, or code of their own). Name other layers in attention_layers, or set "
            "attention_weight to 0."
        )


def require_hidden(wanted: Iterable[int], captured: Mapping[int, Any]) -> None:
    """Every wanted layer must have run, otherwise UserError: a mean over fewer would be another loss."""
    missing = sorted(set(wanted) - set(captured))
    if missing:
        raise UserError(f"layers {missing} did not run, so their hidden states cannot be compared; set hidden_weight to 0")


def _one_stream(layer: nn.Module, output: Any) -> Tensor:
    """``[B, T, H]`` hidden states in the output of a layer."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    if hidden.ndim != 3:
        raise UserError(
            f"{type(layer).__name__}: hands on several streams of hidden states {tuple(hidden.shape)} (AltUp), of which "
            "none is the model's: set hidden_weight to 0 for this model"
        )
    return hidden


@contextmanager
def capture_hidden(model: nn.Module, layers: Iterable[int], observer: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``observer(layer, hidden_BTH)`` with the output of each of ``layers`` while the model runs."""
    modules = decoder_layers(model) if (wanted := sorted(set(layers))) else []

    def show(layer: int, module: nn.Module, _: Any, output: Any) -> None:
        observer(layer, _one_stream(module, output))

    with ExitStack() as hooks:
        for layer in wanted:
            hooks.enter_context(modules[layer].register_forward_hook(partial(show, layer)))
        yield
