"""The losses that look inside: the student's attention and hidden states against its teachers', in its own forward."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from daekit.errors import UserError
from daekit.losses.attention import Pass, attention_loss, relation_heads, row_pairs
from daekit.losses.hidden import hidden_loss
from daekit.models.attention_probe import AttentionCall, probing
from daekit.models.backbone import base_of, checkpointed_layers
from daekit.models.internals import (
    Watch,
    decoder_layers,
    kept_attention,
    observing_layers,
    require_layers,
    require_seen,
    require_watchable,
)
from daekit.protocol import AttentionLayer, Batch, Internals, Signal, Teacher
from daekit.trainers.config import KDConfig
from daekit.trainers.projections import Projections

ATTENTION_METRIC = "attention_kl"


class InsideLosses:
    """Attention and hidden-state losses of one student.

    One batch: ``begin`` with the teachers' signals, the student's forward, ``finish`` inside it; all of that, and the backward
    pass, inside ``watching``.

    Args:
        model: the student.
        args: weights, layers and heads.
        teacher: its signals carry what is compared inside ``watching``, and only there: it may be another student's, too.

    Raises:
        UserError: a teacher that cannot be looked into, or whose layers or heads do not fit.
    """

    def __init__(self, model: nn.Module, args: KDConfig, teacher: Teacher) -> None:
        self.model, self.args = model, args
        config = base_of(model).config.get_text_config()
        self.teacher = require_watchable(teacher)
        self.watch = Watch(
            config,
            attention=args.attention_layers if args.attention_weight else None,
            hidden=args.hidden_layers if args.hidden_weight else None,
            relation_heads=args.attention_relation_heads,
        )
        watched = self.teacher.watch(self.watch)
        self.teacher.watch(None)
        if args.hidden_weight:
            decoder_layers(model)  # says what is wrong now and not in the first step
        self._attention_layers = {layer for each in watched for layer in each.attention}
        self._hidden_layers = {layer for each in watched for layer in each.hidden}
        unequal = {(each.width, layer) for each in watched for layer in each.hidden if each.width != config.hidden_size}
        self.projections = Projections(config.hidden_size, unequal, args.seed) if unequal else None
        if self.projections is not None:
            self.projections.live_in(model)
        self._step: _Step | None = None
        self._watching = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compare while the student runs; the model is as before on leaving. Entered once more inside, it does nothing."""
        if self._watching:
            yield
            return
        with ExitStack() as stack:
            if self.args.attention_weight:
                stack.enter_context(probing(self.model, self._see_attention))
            stack.enter_context(observing_layers(self.model, self._hidden_layers, self._see_hidden))
            self.teacher.watch(self.watch)
            self._watching = True
            try:
                yield
            finally:
                self.teacher.watch(None)
                self._watching, self._step = False, None

    def begin(self, batch: Batch, signals: Sequence[Signal]) -> None:
        """Compare the student's next forward with these signals."""
        wants_gradient = self.model.training and torch.is_grad_enabled()
        self._step = _Step(batch, signals, wants_gradient, checkpointed_layers(self.model) if wants_gradient else set())

    def finish(self) -> dict[str, Tensor]:
        """The student's layers have run: the weighted sum of the losses as ``loss``, and their values ``[N]`` per position.

        Raises:
            UserError: a layer whose attention never came by.
        """
        step, args = self._step, self.args
        assert step is not None, "begin was called"
        step.finished = True
        out: dict[str, Tensor] = {"loss": torch.zeros((), device=step.batch.labels_BT.device)}
        if args.attention_weight:
            require_seen(self._attention_layers, step.attention)
            step.add_mean(step.attention.values(), args.attention_weight, ATTENTION_METRIC, out)
        if args.hidden_weight:
            require_layers(self._hidden_layers, step.hidden)
            step.add_mean(step.hidden.values(), args.hidden_weight, hidden_metric(args), out)
        if not step.checkpointed:
            step.teachers = []  # nothing looks at them again: their memory is free for the backward pass
        return out

    def _see_attention(self, call: AttentionCall) -> None:
        step = self._step
        if step is None or call.layer not in self._attention_layers:
            return
        again = call.layer in step.checkpointed
        if step.finished and not (again and torch.is_grad_enabled()):
            return  # another forward of the student after its loss, for compute_metrics
        step.require_graph()
        run = Pass.GRADIENT if step.finished else Pass.VALUE if again else Pass.BOTH
        student = self._in_heads(kept_attention(call, step.batch, step.checked_masks))
        teachers = [(self._in_heads(internals.attention[call.layer]), pairs_R8) for internals, pairs_R8 in step.teachers]
        loss, value_N = attention_loss(student, teachers, step.batch.layout.offset_N, run)
        if not step.finished:
            heads = student.query_NAD.shape[1]
            step.attention[call.layer] = (loss / heads, value_N / heads)

    def _in_heads(self, layer: AttentionLayer) -> AttentionLayer:
        heads = self.args.attention_relation_heads
        return layer if heads is None else relation_heads(layer, heads)

    def _see_hidden(self, layer: int, hidden_BTH: Tensor) -> None:
        step = self._step
        if step is None or step.finished:  # the forward of a teacher that shares the student's base, or one after the loss
            return
        step.require_graph()
        hidden_NH = step.batch.keep(hidden_BTH)
        loss = torch.zeros((), device=hidden_NH.device)
        if self.projections is not None:
            # also those whose teacher has no row on this rank: DDP waits for their gradient, and ZeRO adds up gradients in
            # the order in which they come, which must be that of the other ranks. So here, before anything reads them.
            loss = loss + 0 * sum(matrix.sum() for matrix in self.projections.of_layer(layer))
        value_N = torch.zeros(len(hidden_NH), device=hidden_NH.device)
        for positions_M, (internals, _) in zip(step.positions, step.teachers, strict=True):
            teacher_MH = internals.hidden_MH[layer]
            same = teacher_MH.shape[1] == hidden_NH.shape[1]
            matrix = None if same or self.projections is None else self.projections.matrix(teacher_MH.shape[1], layer)
            part, value_M = hidden_loss(hidden_NH, teacher_MH, positions_M, matrix, self.args.hidden_loss)
            loss = loss + part
            value_N[positions_M] = value_M.to(value_N.dtype)
        step.hidden[layer] = (loss, value_N)


def hidden_metric(args: KDConfig) -> str:
    """Under which name the hidden-state loss is logged."""
    return f"hidden_{args.hidden_loss}"


class _Step:
    """One batch on its way through the student."""

    def __init__(self, batch: Batch, signals: Sequence[Signal], wants_gradient: bool, checkpointed: set[int]) -> None:
        self.batch, self.wants_gradient, self.checkpointed = batch, wants_gradient, checkpointed
        self.positions = [signal.positions_M for signal in signals]
        self.teachers = [self._paired(signal) for signal in signals]
        self.attention: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden: dict[int, tuple[Tensor, Tensor]] = {}
        self.checked_masks: set[tuple[int, int | None]] = set()
        self.finished = False

    def _paired(self, signal: Signal) -> tuple[Internals, Tensor]:
        """What the signal holds, and which of its rows is which of the batch's."""
        if signal.internals is None:
            raise UserError("a teacher's signal has no internals, as attention_weight and hidden_weight need of every teacher")
        return signal.internals, row_pairs(self.batch.layout, signal.internals.layout, signal.positions_M)

    def require_graph(self) -> None:
        """UserError where a layer runs without gradient that will be run again with one: what is compared would be lost."""
        if self.wants_gradient and not torch.is_grad_enabled():
            raise UserError(
                "reentrant gradient checkpointing runs the layers without gradient, so attention and hidden-state losses would "
                "teach nothing: set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    @staticmethod
    def add_mean(layers: Collection[tuple[Tensor, Tensor]], weight: float, name: str, out: dict[str, Tensor]) -> None:
        """Add the mean over layers of (loss, value per position) to what ``finish`` returns."""
        out["loss"] = out["loss"] + weight / len(layers) * torch.stack([loss for loss, _ in layers]).sum()
        out[name] = torch.stack([value_N for _, value_N in layers]).mean(0)
