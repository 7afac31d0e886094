"""What happens inside a model's forward: queries and keys of its attention, hidden states between its layers.

``Watch`` says what the losses of a student want to see, ``Watched`` which layers of one teacher that means, and
``kept_states`` runs a frozen model once and keeps exactly that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedConfig

from daekit.errors import UserError
from daekit.models.attention_probe import AttentionCall, probed_name, probing, require_row_mask
from daekit.models.backbone import base_of, kept_hidden_states
from daekit.models.heads import compute_dtype
from daekit.protocol import AttentionLayer, Batch, Internals, Teacher

LayerChoice = str | tuple[tuple[int, int], ...]
_LAST = re.compile(r"^last_([1-9]\d*)$")


@dataclass(frozen=True)
class Watch:
    """What the losses of one student look at inside its teachers.

    Attributes:
        student: the student's config: its depth and its heads.
        attention: which layers' attention, as for ``match_layers``; None: of none.
        hidden: which layers' hidden states.
        relation_heads: attention is compared in so many relation heads; None: in the model's own heads, one to one.
    """

    student: PreTrainedConfig
    attention: LayerChoice | None = None
    hidden: LayerChoice | None = None
    relation_heads: int | None = None

    def of(self, teacher: PreTrainedConfig) -> Watched:
        """The layers of a teacher that this means.

        Raises:
            UserError: layers that do not exist; other numbers of heads without relation heads; an attention implementation
                that cannot be probed.
        """
        ours, theirs = self.student, teacher.get_text_config()
        if self.attention is not None:
            probed_name(theirs._attn_implementation, f"teacher ({theirs.model_type})")
            probed_name(ours._attn_implementation, f"student ({ours.model_type})")
            if self.relation_heads is None:
                require_equal_heads(ours.num_attention_heads, theirs.num_attention_heads)
            else:
                for who, config in (("student", ours), ("teacher", theirs)):
                    require_divisible(who, config, self.relation_heads)
        depths = ours.num_hidden_layers, theirs.num_hidden_layers
        attention = match_layers(self.attention, *depths) if self.attention is not None else {}
        hidden = match_layers(self.hidden, *depths) if self.hidden is not None else {}
        return Watched(attention, hidden, theirs.hidden_size)


@dataclass(frozen=True)
class Watched:
    """Student's layer -> the layer of this model that it follows, and the width of this model's hidden states."""

    attention: Mapping[int, int]
    hidden: Mapping[int, int]
    width: int


def match_layers(choice: LayerChoice, student: int, teacher: int) -> dict[int, int]:
    """Student's layer -> teacher's layer, counted from 0.

    Args:
        choice: ``uniform``: every layer of the student, spread evenly, the last one on the last; ``last_K``: the last K of
            both; or pairs (student's layer, teacher's layer).
        student: its number of layers.
        teacher: its number of layers.

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


@runtime_checkable
class WatchableTeacher(Teacher, Protocol):
    """A teacher that can be looked into: between ``watch(...)`` and ``watch(None)`` its signals carry internals."""

    def watch(self, watch: Watch | None) -> list[Watched]:
        """Fill the internals of every signal until ``watch(None)``; returns what that means for each of its models.

        Raises:
            UserError: the student's layers or heads have no counterpart here.
        """
        ...


def require_divisible(who: str, config: PreTrainedConfig, relation_heads: int) -> None:
    """The width of all heads together must split into relation heads, otherwise UserError."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)  # as transformers reads it
    if width % relation_heads:
        raise UserError(
            f"attention_relation_heads={relation_heads}: does not divide the width of all heads of the {who}, {width} "
            f"({heads} heads); choose a number that divides it in student and teacher"
        )


def require_watchable(teacher: Teacher) -> WatchableTeacher:
    """The teacher itself, if it can be looked into, otherwise UserError."""
    if isinstance(teacher, WatchableTeacher):
        return teacher
    raise UserError(
        f"{type(teacher).__name__} cannot be looked into (it has no method watch), as attention_weight and hidden_weight need. "
        "Set them to 0, or give its model to a ModelTeacher."
    )


class Recorder:
    """Keeps queries, keys and hidden states of chosen layers while a frozen model runs.

    Args:
        batch: what the model sees; only its kept positions are stored (and the keys of all).
        watched: which layers.
    """

    def __init__(self, batch: Batch, watched: Watched) -> None:
        self.batch, self.watched = batch, watched
        self._attention: dict[int, AttentionLayer] = {}
        self._hidden: dict[int, Tensor] = {}
        self._checked: set[tuple[int, int | None]] = set()

    def attention(self, call: AttentionCall) -> None:
        """The probe of the model's attention."""
        if call.layer in self.watched.attention.values():
            self._attention[call.layer] = kept_attention(call, self.batch, self._checked)

    def hidden(self, layer: int, hidden_BTH: Tensor) -> None:
        """The observer of the model's layers."""
        self._hidden[layer] = self.batch.keep(hidden_BTH)

    def internals(self) -> Internals:
        """Everything, by the student's layers.

        Raises:
            UserError: a layer whose attention never came by.
        """
        require_seen(self.watched.attention.values(), self._attention)
        require_layers(self.watched.hidden.values(), self._hidden)
        return Internals(
            self.batch.layout,
            {ours: self._attention[theirs] for ours, theirs in self.watched.attention.items()},
            {ours: self._hidden[theirs] for ours, theirs in self.watched.hidden.items()},
        )


def kept_states(model: nn.Module, batch: Batch, watched: Watched | None) -> tuple[Tensor, Internals | None]:
    """``[N, H]`` last hidden states at the kept positions, and the internals if any are watched.

    Memory: N x A x D + B x T x G x D values per watched layer of attention, N x H per watched layer of hidden states.
    """
    if watched is None:
        return kept_hidden_states(model, batch), None
    recorder = Recorder(batch, watched)
    with ExitStack() as stack:
        if watched.attention:
            stack.enter_context(probing(model, recorder.attention))
        stack.enter_context(observing_layers(model, watched.hidden.values(), recorder.hidden))
        hidden_NH = kept_hidden_states(model, batch)
    return hidden_NH, recorder.internals()


def kept_attention(call: AttentionCall, batch: Batch, checked: set[tuple[int, int | None]]) -> AttentionLayer:
    """The call's queries at the kept positions, and its keys; its mask is looked at once, as layers share it.

    Under autocast both are rounded as the model's own attention rounds them (rotary embedding leaves them in float32).

    Args:
        call: of a layer.
        batch: what the model sees.
        checked: the masks (by identity) and windows that have been looked at in this forward; added to.
    """
    kind = (id(call.mask), call.window)
    if kind not in checked:
        require_row_mask(call, batch)
        checked.add(kind)
    dtype = compute_dtype(call.query_BATD)
    query_NAD = batch.keep(call.query_BATD.transpose(1, 2)).to(dtype)
    return AttentionLayer(query_NAD, call.key_BGTD.to(dtype), call.scaling, call.window)


def require_seen(wanted: Iterable[int], seen: Mapping[int, Any]) -> None:
    """Every wanted layer must have called its attention function.

    Raises:
        UserError: one has not: linear attention, a state-space layer, code that calls no attention function.
    """
    missing = sorted(set(wanted) - set(seen))
    if missing:
        raise UserError(
            f"the attention of layers {missing} cannot be captured: they never called transformers' attention function (linear "
            "attention, a state-space layer, or code of their own). Name other layers in attention_layers, or set "
            "attention_weight to 0."
        )


def require_layers(wanted: Iterable[int], seen: Mapping[int, Any]) -> None:
    """Every wanted layer must have run, otherwise UserError: a mean over fewer would be another loss."""
    missing = sorted(set(wanted) - set(seen))
    if missing:
        raise UserError(f"layers {missing} did not run, so their hidden states cannot be compared; set hidden_weight to 0")


@contextmanager
def observing_layers(model: nn.Module, layers: Iterable[int], observer: Any) -> Iterator[None]:
    """Show ``observer(layer, hidden_BTH)`` what comes out of each of ``layers`` while the model runs."""
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
        raise UserError(
            f"{type(base).__name__}: its layers could not be found, as hidden_weight and teachers under FSDP2 need. Set "
            "hidden_weight to 0, and launch with recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml."
        )
    return layers
