"""Features of a model: queries and keys of its attention, hidden states behind its layers.

``FeatureSpec`` says which features a student is compared by, ``layers_of`` which layers of one teacher that means, and
``states_and_features`` runs a frozen model once and keeps exactly those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.models.attention_capture import AttentionCall, capture_attention, capturing_function, require_row_mask
from daekit.models.backbone import base_of, hidden_at_loss_positions
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

_LAST = re.compile(r"^last_([1-9]\d*)$")


def layers_of(spec: FeatureSpec, teacher: PreTrainedConfig) -> FeatureLayers:
    """The layers of a teacher that a spec means.

    Raises:
        UserError: layers that do not exist; other numbers of heads without relation heads; an attention implementation
            that cannot be captured.
    """
    ours, theirs = spec.student, teacher.get_text_config()
    if spec.attention is not None:
        capturing_function(theirs._attn_implementation, f"teacher ({theirs.model_type})")
        capturing_function(ours._attn_implementation, f"student ({ours.model_type})")
        if spec.relation_heads is None:
            require_equal_heads(ours.num_attention_heads, theirs.num_attention_heads)
        else:
            for who, config in (("student", ours), ("teacher", theirs)):
                require_divisible(who, config, spec.relation_heads)
    depths = ours.num_hidden_layers, theirs.num_hidden_layers
    attention = match_layers(spec.attention, *depths) if spec.attention is not None else {}
    hidden = match_layers(spec.hidden, *depths) if spec.hidden is not None else {}
    return FeatureLayers(attention, hidden, theirs.hidden_size)


def match_layers(choice: LayerChoice, student: int, teacher: int) -> dict[int, int]:
    """Student's layer -> teacher's layer, counted from 0.

    Args:
        choice: ``uniform``: every layer of the student, spread evenly, the last one on the last; ``last_K``: the last K of
            both; or pairs (student's layer, teacher's layer).
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Raises:
        UserError: an unknown choice, a layer that does not exist, or one of the student's that is named twice.
    """
    last = _LAST.match(choice) if isinstance(choice, str) else None
    if choice == "uniform":
        pairs = [(layer, -(-(layer + 1) * teacher // student) - 1) for layer in range(student)]
    elif last is not None:
        pairs = [(student - back, teacher - back) for back in range(int(last.group(1)), 0, -1)]
    elif isinstance(choice, str) or not choice:
        raise UserError(f"layers {choice!r}: choose uniform, last_K (last_4), or pairs of a student's and a teacher's layer")
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


class _Capture:
    """Keeps queries, keys and hidden states of chosen layers while a frozen model runs."""

    def __init__(self, batch: Batch, layers: FeatureLayers) -> None:
        self.batch, self.layers = batch, layers
        self._attention: dict[int, AttentionLayer] = {}
        self._hidden: dict[int, Tensor] = {}
        self._checked: set[tuple[int, int | None]] = set()

    def attention(self, call: AttentionCall) -> None:
        if call.layer in self.layers.attention.values():
            self._attention[call.layer] = attention_at_loss_positions(call, self.batch, self._checked)

    def hidden(self, layer: int, hidden_BTH: Tensor) -> None:
        self._hidden[layer] = self.batch.at_loss_positions(hidden_BTH)

    def features(self) -> Features:
        """All of them, by the student's layers; UserError for a layer that was not captured."""
        require_attention(self.layers.attention.values(), self._attention)
        require_hidden(self.layers.hidden.values(), self._hidden)
        return Features(
            self.batch.layout,
            {ours: self._attention[theirs] for ours, theirs in self.layers.attention.items()},
            {ours: self._hidden[theirs] for ours, theirs in self.layers.hidden.items()},
        )


def states_and_features(model: nn.Module, batch: Batch, capture: FeatureSpec | None) -> tuple[Tensor, Features | None]:
    """``[N, H]`` last hidden states at the loss positions, and the features that ``capture`` asks for.

    Memory: N x A x D + B x T x G x D values per captured layer of attention, N x H per captured layer of hidden states.
    """
    if capture is None:
        return hidden_at_loss_positions(model, batch), None
    layers = layers_of(capture, base_of(model).config)
    found = _Capture(batch, layers)
    with ExitStack() as stack:
        if layers.attention:
            stack.enter_context(capture_attention(model, found.attention))
        stack.enter_context(capture_hidden(model, layers.hidden.values(), found.hidden))
        hidden_NH = hidden_at_loss_positions(model, batch)
    return hidden_NH, found.features()


def attention_at_loss_positions(call: AttentionCall, batch: Batch, checked: set[tuple[int, int | None]]) -> AttentionLayer:
    """The call's queries at the loss positions, and its keys; its mask is checked once, as layers share it.

    Under autocast both are rounded as the model's own attention rounds them (rotary embedding leaves them in float32).

    Args:
        call: Call of the attention function of one layer.
        batch: The batch that the model sees.
        checked: the masks (by identity) and windows that have been checked in this forward; added to.
    """
    kind = (id(call.mask), call.window)
    if kind not in checked:
        require_row_mask(call, batch)
        checked.add(kind)
    dtype = compute_dtype(call.query_BATD)
    query_NAD = batch.at_loss_positions(call.query_BATD.transpose(1, 2)).to(dtype)
    return AttentionLayer(query_NAD, call.key_BGTD.to(dtype), call.scaling, call.window)


def require_attention(wanted: Iterable[int], captured: Mapping[int, Any]) -> None:
    """Every wanted layer must have called its attention function.

    Raises:
        UserError: one has not: linear attention, a state-space layer, code that calls no attention function.
    """
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


@contextmanager
def capture_hidden(model: nn.Module, layers: Iterable[int], observer: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``observer(layer, hidden_BTH)`` with the output of each of ``layers`` while the model runs."""
    modules = decoder_layers(model) if (wanted := sorted(set(layers))) else []
    hooks = [
        modules[layer].register_forward_hook(
            lambda _, __, output, layer=layer: observer(layer, output if isinstance(output, Tensor) else output[0])
        )
        for layer in wanted
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, in order.

    Raises:
        UserError: an architecture that does not say which of its modules they are.
    """
    base = base_of(model)
    recorded = base.base_model._can_record_outputs or {}
    kind = recorded.get("hidden_states")
    modules: list[nn.Module] = list(base.modules())
    layers = [module for module in modules if isinstance(kind, type) and isinstance(module, kind)]
    if len(layers) != base.config.get_text_config().num_hidden_layers:
        raise UserError(f"{type(base).__name__}: its layers could not be found, so hidden_weight must be 0 for this model")
    return layers
