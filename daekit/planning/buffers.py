"""What teachers' signals and the losses hold besides weights and activations."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from daekit.losses.chunk import chunk_terms
from daekit.losses.prediction import chunk_tokens
from daekit.models.internals import Watch
from daekit.planning.models import Speaker, StageModels
from daekit.planning.trace import ModelCost, Setting, most
from daekit.planning.training import Machine, Training
from daekit.recipe.schema import LossSpec, StageSpec

_BLOCK_SCORES = 2**20  # of daekit.losses.attention_blocks
_SHORTEST_BLOCK = 16
_TILE = 2**22  # values of the head's gradient that are summed at a time


class Buffers:
    """Of one stage: signals, buffers of the losses, and what the losses inside the model keep.

    Args:
        stage: of a resolved recipe.
        models: its models.
        training: its options.
        machine: where it runs.
        setting: one micro-batch.
    """

    def __init__(self, stage: StageSpec, models: StageModels, training: Training, machine: Machine, setting: Setting) -> None:
        self.stage, self.models, self.training, self.machine, self.setting = stage, models, training, machine, setting
        self.kept = training.tokens  # N
        self.student = models.student.skeleton

    @cached_property
    def _cost(self) -> ModelCost:
        return self.models.student.cost(self.setting)

    @cached_property
    def hidden(self) -> int:
        """Bytes of the student's hidden states at all positions."""
        return self.kept * int(self.student.config.hidden_size) * self._cost.hidden_width

    def extra_saved(self, layers: int) -> int:
        """Gradients that the losses inside a layer have computed ahead; evenly over the layers."""
        return layers * self._inside // len(self._cost.layers)

    @cached_property
    def _inside(self) -> int:
        attention, hidden = self.watched_layers
        compared = attention * _captured(self.student.config) * self._compute_width if attention else 0
        return self.kept * compared + hidden * self.hidden

    @cached_property
    def _compute_width(self) -> int:
        return self.training.autocast.itemsize if self.training.autocast is not None else self._cost.hidden_width

    @cached_property
    def _watch(self) -> Watch | None:
        loss = _loss_of(self.stage)
        if not (loss.attention_weight or loss.hidden_weight):
            return None
        return Watch(
            self.student.config,
            attention=loss.attention_layers if loss.attention_weight else None,  # type: ignore[arg-type]
            hidden=loss.hidden_layers if loss.hidden_weight else None,  # type: ignore[arg-type]
            relation_heads=loss.attention_relation_heads,
        )

    @cached_property
    def watched_layers(self) -> tuple[int, int]:
        """How many layers of the student are compared: their attention, their hidden states."""
        if self._watch is None:
            return 0, 0
        watched = self._watch.of(self.student.config)
        return len(watched.attention), len(watched.hidden)

    @cached_property
    def signals(self) -> tuple[int, int]:
        """(what the teachers' signals hold until the loss, what of it until the end of the backward pass)."""
        groups = []
        for group in self.models.groups:
            last = sum(self.kept * int(s.skeleton.config.hidden_size) * self._width_of(s) for s in group)
            inside = sum(self._internals(s) for s in group) if self._watch is not None else 0
            groups.append((last + inside, inside if self.training.checkpointing else 0))
        return max(groups, default=(0, 0))

    def _internals(self, speaker: Speaker) -> int:
        """Queries, keys and hidden states that one teacher's layers leave."""
        config = speaker.skeleton.config
        attention, hidden = self.watched_layers
        width = self.training.autocast.itemsize if self.training.autocast is not None else self._width_of(speaker)
        compared = attention * _captured(config) * width if attention else 0
        return self.kept * (compared + hidden * int(config.hidden_size) * self._width_of(speaker))

    def _width_of(self, speaker: Speaker) -> int:
        return speaker.tracer.cost(self.setting).hidden_width

    @cached_property
    def scores(self) -> int:
        """Blocks of attention scores of both models; GPU kernels have none."""
        if not self.watched_layers[0] or self.machine.gpu:
            return 0
        row = self.student.config.num_attention_heads * self.training.length
        return 4 * 4 * max(_BLOCK_SCORES, _SHORTEST_BLOCK * row)

    @cached_property
    def _head_trained(self) -> bool:
        return bool(self.student.head.requires_grad)

    @cached_property
    def head_gradient(self) -> int:
        return self.student.head.numel() * self.student.head.element_size() if self._head_trained else 0

    @cached_property
    def embedding_trained(self) -> bool:
        return bool(self.student.embedding.requires_grad)

    @cached_property
    def embedding_bytes(self) -> int:
        return self.student.embedding.numel() * self.student.embedding.element_size()

    @cached_property
    def embedding_gradient(self) -> int:
        return self.embedding_bytes if self.embedding_trained and not self.student.tied else 0

    @cached_property
    def loss(self) -> tuple[int, int]:
        """(gradients that the loss keeps for the backward pass, its work space)."""
        columns, hidden_size = self.student.head.shape
        gpu, width = self.machine.gpu, self._compute_width
        step = min(chunk_tokens(columns, gpu), self.kept)
        voices = max((len(group) for group in self.models.groups), default=0)
        kept = self.hidden + self.head_gradient
        work = step * columns * (width + (4 if voices else 0)) + step * hidden_size * (width + 4)
        if not gpu:
            work += self._chunk_bytes(step, columns, voices)
        elif width != 4 and voices:
            work += step * columns * width  # a teacher's linear outputs, before they are copied in float32
        work += max(voices - 1, 0) * step * columns * 4
        work += self._cast_heads(width)
        if self._head_trained and (self.kept > step or len(self.models.groups) > 1) and self.student.head.element_size() != 4:
            work += self.student.head.numel() * 4  # summed in float32
        if self._head_trained and self.kept > step:
            work += 4 * _TILE
        return kept, work

    def _cast_heads(self, width: int) -> int:
        """Copies of output heads in the dtype of the products."""
        heads = [self.student.head]
        groups = self.models.groups
        heads += [speaker.skeleton.head for speaker in (max(groups, key=len) if groups else [])]
        return sum(head.numel() * width for head in heads if head.element_size() != width)

    def _chunk_bytes(self, step: int, columns: int, voices: int) -> int:
        """Temporaries of one chunk on a CPU, from the loss itself."""
        loss = _loss_of(self.stage)
        parameter = loss.beta if loss.divergence == "jsd" else loss.skew_alpha
        dtype = torch.bfloat16 if self._compute_width == 2 else torch.float32
        with FakeTensorMode():
            student = torch.empty(step, columns, dtype=dtype)
            teacher = torch.empty(step, columns) if voices else None
            labels = torch.zeros(step, dtype=torch.long)
            numbers = (loss.divergence, parameter, loss.temperature, loss.ce_weight or 1.0 * (not voices))
            given = [t for t in (student, teacher, labels) if t is not None]
            return most(lambda: chunk_terms(student, teacher, labels, *numbers, loss.prediction_weight, None, 1.0, True), given)


def _loss_of(stage: StageSpec) -> LossSpec:
    """The objective; that of an sft stage is the cross-entropy, whatever the rest of it says."""
    return LossSpec() if stage.type == "sft" else stage.loss


def _captured(config: Any) -> int:
    """Values per token of one layer's queries and keys."""
    return int((config.num_attention_heads + config.num_key_value_heads) * head_width(config))


def head_width(config: Any) -> int:
    """D of an attention head, as transformers reads it."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
